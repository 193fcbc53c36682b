"""Data of each model in a list of models beside its state: when it was listed, and its context length. Pure.

Clients shorten conversations by ``max_model_len``. A model's engine reports it once it is loaded; before that it is
known where the catalog asks for a length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gateway_plugin.catalog import Model
from gateway_plugin.option_values import number_of, value_of
from serve.core.events import CatalogChanged, EngineReady, Event
from serve.core.state import Fleet


@dataclass(frozen=True)
class Card:
    """One model of the catalog."""

    created: int
    """When it was first listed; seconds since 1970."""
    source: str
    args: tuple[str, ...]
    max_model_len: int | None = None
    """The length reported by an engine with this source and these arguments."""


Cards = Mapping[str, Card]


def after(cards: Cards, fleet: Fleet, event: Event, wall_s: float) -> Cards:
    """The cards after ``event``, which ``fleet`` does not include yet; the same object where nothing changed.

    (1) Another catalog: new models are created now; a reported length counts while source and arguments are the same.
    (2) An engine is ready and reports its length.
    """
    found = dict(cards)
    if isinstance(event, CatalogChanged):  # (1)
        found = {model.name: _listed(cards.get(model.name), model, wall_s) for model in event.models}
    elif isinstance(event, EngineReady) and event.max_model_len is not None:  # (2)
        engine = fleet.engines.get(event.engine)
        card = cards.get(engine.model) if engine is not None else None
        if engine is not None and card is not None:
            found[engine.model] = Card(card.created, card.source, card.args, event.max_model_len)
    return cards if found == cards else found


def _listed(card: Card | None, model: Model, wall_s: float) -> Card:
    if card is None:
        return Card(int(wall_s), model.source, model.args)
    same = (card.source, card.args) == (model.source, model.args)
    return card if same else Card(card.created, model.source, model.args)


def on_card(card: Card | None) -> dict[str, int | None]:
    """``created`` and ``max_model_len``, as ``GET /v1/models`` shows them."""
    if card is None:
        return {"created": 0, "max_model_len": None}
    return {"created": card.created, "max_model_len": card.max_model_len or asked_length(card.args)}


def asked_length(args: tuple[str, ...]) -> int | None:
    """The length that vLLM's arguments ask for; ``None`` where they leave it to the model."""
    return number_of(value_of(args, "max-model-len"))


def cards_to_json(cards: Cards) -> dict[str, Any]:
    """Ready for ``json.dumps``."""
    return {name: asdict(card) for name, card in cards.items()}


def cards_from_json(document: Any) -> Cards:
    """Cards written by ``cards_to_json``. Raises ``ValueError``, ``TypeError``, ``KeyError`` or ``AttributeError``."""
    return {
        str(name): Card(
            int(kept["created"]),
            str(kept["source"]),
            tuple(map(str, kept["args"])),
            None if kept["max_model_len"] is None else int(kept["max_model_len"]),
        )
        for name, kept in document.items()
    }
