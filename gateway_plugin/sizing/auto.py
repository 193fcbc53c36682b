"""``memory_gib: auto``: the memory of a catalog entry from its model's sizes and its own options. Pure.

Without ``--max-model-len`` vLLM takes the model's whole context, and does not start where its cache cannot hold that.
So the length that was counted with is put into the entry's ``args``, before the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway_plugin.catalog import Model
from gateway_plugin.option_values import number_of, value_of
from gateway_plugin.sizing.estimate import BYTES, Estimate, estimate_transformers, tokens_held
from gateway_plugin.sizing.plan import CONTEXT_DEFAULT, GIB, SEQUENCES_DEFAULT, Room, Source, Wish, fits, weights_of

_UNCOUNTED = ("speculative-config", "cpu-offload-gb", "kv-transfer-config", "offload-group-size", "enable-lora")
"""Options with memory of their own, or less on the GPU, that is not counted."""
_CACHE_ELEMENT = {"fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "fp8_inc": 1.0, "float16": 2.0, "bfloat16": 2.0}
_ANYWHERE = 2**60


class Unsized(Exception):
    """The memory of an entry cannot be worked out; the text says why."""


@dataclass(frozen=True)
class Sized:
    """An entry's memory."""

    engine: Estimate
    args: tuple[str, ...]
    """For the engine, before the entry's own ``args``."""

    def applied(self, model: Model) -> Model:
        """``model`` with its memory."""
        gib = self.engine.gib
        update = {"memory_gib": gib, "predicted_gib": gib, "args": (*self.args, *model.args)}
        return model.model_copy(update=update)


def refusal(model: Model) -> str:
    """Why the memory of such an entry cannot be worked out for any model; ``""``: it can."""
    if model.engine == "transformers":
        return "of Transformers that is done for one GPU, or none" if model.gpus > 1 else ""
    if model.engine != "vllm":
        return f"that is done for vLLM and Transformers; how much 'engine: {model.engine}' takes is not known"
    if found := next((option for option in _UNCOUNTED if value_of(model.args, option) is not None), None):
        return f"what --{found} takes is not counted"
    if model.adapters is not None:  # vLLM is started with --enable-lora
        return "what its adapters take is not counted"
    return ""


def sized(model: Model, source: Source, rooms: Sequence[Room]) -> Sized:
    """The memory of ``model``'s engine on the first of these node types that holds it.

    (1) The context is the entry's ``--max-model-len``, else as ``plan`` cuts it; room is made for four sequences of
    that length, for fewer where ``--max-num-seqs`` says so or no more fit. (2) ``--kv-cache-memory-bytes`` is taken as
    it is. Without ``rooms`` nothing is cut. Of Transformers, whose cache grows with a request, room is made for one
    request of that length.

    Raises ``Unsized``: it fits on none, or its options contradict each other.
    """
    if why := refusal(model):
        raise Unsized(why)
    args, architecture = model.args, source.architecture
    if model.engine == "transformers":
        context = min(architecture.context, CONTEXT_DEFAULT)
        weights = weights_of(source, Wish())
        return Sized(estimate_transformers(architecture, weights, model.gpus, context), ())
    asked = number_of(value_of(args, "max-model-len"))
    at_most = number_of(value_of(args, "max-num-seqs")) or SEQUENCES_DEFAULT
    wish = Wish(
        context=asked,
        sequences=at_most if at_most < SEQUENCES_DEFAULT else None,
        gpus=model.gpus or None,
        quantization=value_of(args, "quantization", "q") or "",
        cache_element=_CACHE_ELEMENT.get(value_of(args, "kv-cache-dtype") or "", 0.0),
        element=BYTES.get(value_of(args, "dtype") or "", 0.0),
    )
    given = number_of(value_of(args, "kv-cache-memory-bytes"))
    if given is not None and architecture.attention:
        wish = replace(wish, context=_within(given, source, wish), sequences=1)  # (2)
    found = fits(source, _rooms(model, rooms), wish)  # (1)
    engine = next((fit.engine for fit in found if fit.engine is not None), None)
    if engine is None:
        why = "; ".join(f"{fit.node_type}: {fit.because}" for fit in found)
        kind = f"with {model.gpus} GPUs" if model.gpus else "without GPUs ('gpus' is not given)"
        raise Unsized(f"it fits on no node type {kind}: {why or 'the site has none'}")
    if given is not None:
        engine = replace(engine, cache=given)
    added: list[str] = []
    if asked is None and architecture.attention and engine.context < architecture.context:
        added += ["--max-model-len", str(engine.context)]
    if given is None and architecture.attention and not model.gpus:
        added += ["--kv-cache-memory-bytes", str(engine.cache)]
    return Sized(engine, tuple(added))


def _rooms(model: Model, rooms: Sequence[Room]) -> list[Room]:
    """The part of each node type that the entry's engines use."""
    if not rooms:
        return [Room("any", model.gpus, _ANYWHERE, _ANYWHERE)]
    if model.gpus:
        return [room for room in rooms if room.gpus]
    return [Room(room.name, 0, 0, room.host_bytes) for room in rooms if room.host_bytes]


def _within(given: int, source: Source, wish: Wish) -> int:
    """The context that a cache of ``given`` bytes on each GPU holds. Raises ``Unsized`` if that is less than asked."""
    architecture, gpus = source.architecture, wish.gpus or 1
    element = wish.cache_element if wish.gpus else wish.element or 4.0
    wanted = wish.context or architecture.context
    held = tokens_held(architecture, given, wanted, gpus, element)
    if held == wanted:
        return wanted
    if wish.context is not None or not held:
        raise Unsized(
            f"--kv-cache-memory-bytes ({given / GIB:.2f} GiB) holds {held} tokens of its cache, and one request may "
            f"have {wanted}"
        )
    return held if held < 1024 else held // 1024 * 1024
