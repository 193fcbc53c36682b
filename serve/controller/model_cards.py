"""The cards of the models: kept for the next controller, and what follows from what engines hold."""

from __future__ import annotations

import logging

from serve.controller.journal import Journal
from serve.core.events import CatalogChanged, EngineGrew, EngineReady, Event
from serve.core.state import Fleet
from serve.core.views.cards import Cards, after, on_card, raised

log = logging.getLogger("gateway.controller")


class ModelCards:
    """They are read once, and written at each change."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._cards = journal.cards()

    def note(self, before: Fleet, event: Event, wall_s: float) -> CatalogChanged | None:
        """Change the cards for ``event``, which ``before`` does not include. Returns a further event: a catalog with
        more memory (``with_more_memory``)."""
        cards = after(self._cards, before, event, wall_s)
        if cards is not self._cards:
            self._cards = cards
            self._journal.keep_cards(cards)
        return with_more_memory(before, event, cards)

    def shown(self, model: str, *, detail: bool) -> dict[str, float | None]:
        """``on_card`` of a model."""
        return on_card(self._cards.get(model), detail=detail)


def with_more_memory(before: Fleet, event: Event, cards: Cards) -> CatalogChanged | None:
    """The catalog after ``event`` with the memory that engines were seen to hold, where that was worked out and is too
    little; ``None`` if it is enough. It is not written to ``catalog.json``, which stays comparable with the user's
    file: the cards are kept, and the next controller raises it again."""
    if isinstance(event, CatalogChanged):
        models = event.models
    elif isinstance(event, EngineReady | EngineGrew):
        models = tuple(before.models.values())
    else:
        return None
    more = raised(models, cards, before.policy.node_types)
    for model, was in zip(more, models, strict=True):
        if model is not was:
            words = {"model": was.name, "predicted_gib": was.memory_gib, "memory_gib": model.memory_gib}
            log.warning("memory-raised", extra={**words, "measured_mib": cards[was.name].used_mib})
    return CatalogChanged(more) if more != models else None
