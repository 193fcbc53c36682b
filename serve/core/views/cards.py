"""Data of each model in a list of models beside its state: when it was listed, its context length, its memory. Pure.

Clients shorten conversations by ``max_model_len``. A model's engine reports it once it is loaded; before that it is
known where the catalog asks for a length. The memory that an engine was seen to hold is compared with what was planned
with; a number that was worked out and is too small is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gateway_plugin.catalog import Model
from gateway_plugin.option_values import number_of, value_of
from serve.core.events import CatalogChanged, EngineGrew, EngineReady, Event
from serve.core.policy import NodeTypeSpec
from serve.core.state import Fleet

_MARGIN = 1.05
"""A number that was too small is raised to so much of what was measured."""


@dataclass(frozen=True)
class Card:
    """One model of the catalog."""

    created: int
    """When it was first listed; seconds since 1970."""
    source: str
    args: tuple[str, ...]
    max_model_len: int | None = None
    """The length reported by an engine with this source and these arguments."""
    gpus: int = 0
    load_s: float | None = None
    """Of its last load."""
    used_mib: int = 0
    """The most that such an engine was seen to hold, of each of its GPUs or of the host; 0: not known."""
    kv_tokens: int = 0
    """Tokens that the last such engine's cache had room for; 0: not known."""


Cards = Mapping[str, Card]


def after(cards: Cards, fleet: Fleet, event: Event, wall_s: float) -> Cards:
    """The cards after ``event``, which ``fleet`` does not include yet; the same object where nothing changed.

    (1) Another catalog: new models are created now; what was reported counts while source, arguments and GPUs are the
    same. (2) An engine is ready and reports its length and what it holds. (3) It holds more.
    """
    found = dict(cards)
    if isinstance(event, CatalogChanged):  # (1)
        found = {model.name: _listed(cards.get(model.name), model, wall_s) for model in event.models}
    elif isinstance(event, EngineReady):  # (2)
        engine = fleet.engines.get(event.engine)
        card = cards.get(engine.model) if engine is not None else None
        if engine is not None and card is not None:
            found[engine.model] = replace(
                card,
                max_model_len=event.max_model_len or card.max_model_len,
                load_s=round(event.load_s, 1),
                used_mib=max(event.used_mib, card.used_mib),
                # vLLM starts where the cache holds one sequence: an encoder, which has none, says less
                kv_tokens=event.kv_tokens if event.kv_tokens >= (event.max_model_len or 0) else 0,
            )
    elif isinstance(event, EngineGrew):  # (3)
        engine = fleet.engines.get(event.engine)
        card = cards.get(engine.model) if engine is not None else None
        if engine is not None and card is not None:
            found[engine.model] = replace(card, used_mib=max(event.used_mib, card.used_mib))
    return cards if found == cards else found


def _listed(card: Card | None, model: Model, wall_s: float) -> Card:
    if card is None:
        return Card(int(wall_s), model.source, model.args, gpus=model.gpus)
    same = (card.source, card.args, card.gpus) == (model.source, model.args, model.gpus)
    return card if same else Card(card.created, model.source, model.args, gpus=model.gpus)


def raised(models: Iterable[Model], cards: Cards, node_types: Iterable[NodeTypeSpec]) -> tuple[Model, ...]:
    """``models``, with more memory for those whose memory was worked out and whose engines were seen to hold more: no
    more than a node type has, or it would never be loaded again. Not with GPUs: of these vLLM fills what it is given,
    and would hold the more, the more that is."""
    kinds = tuple(node_types)
    return tuple(_raised(model, cards.get(model.name), kinds) for model in models)


def _raised(model: Model, card: Card | None, kinds: tuple[NodeTypeSpec, ...]) -> Model:
    if model.gpus or model.predicted_gib is None or card is None or card.used_mib <= model.memory_mib:
        return model
    has_gib = max((kind.host_mib for kind in kinds), default=0) / 1024
    gib = min(math.ceil(card.used_mib * _MARGIN / 102.4) / 10, has_gib)
    return model if gib <= model.memory_gib else model.model_copy(update={"memory_gib": gib})


def on_card(card: Card | None, *, detail: bool = False) -> dict[str, float | None]:
    """``created`` and ``max_model_len``, as ``GET /v1/models`` shows them; ``detail``: for administrators, with
    ``measured_on``."""
    more = measured_on(card) if detail else {}
    if card is None:
        return {"created": 0, "max_model_len": None, **more}
    return {"created": card.created, "max_model_len": card.max_model_len or asked_length(card.args), **more}


def measured_on(card: Card | None) -> dict[str, float | None]:
    """What administrators see beside what was planned with: GiB held by an engine, tokens that its cache holds, seconds
    of its last load; each ``None`` if not known."""
    known = card or Card(0, "", ())
    return {
        "measured_gib": round(known.used_mib / 1024, 2) if known.used_mib else None,
        "cache_tokens": known.kv_tokens or None,
        "load_s": known.load_s,
    }


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
            int(kept.get("gpus", 0)),
            None if kept.get("load_s") is None else float(kept["load_s"]),
            int(kept.get("used_mib", 0)),
            int(kept.get("kv_tokens", 0)),
        )
        for name, kept in document.items()
    }
