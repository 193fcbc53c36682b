"""Whether and how a model fits on each node type of a site. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway_plugin.sizing.architecture import Architecture
from gateway_plugin.sizing.estimate import Estimate, divides, estimate, estimate_host, longest_context, weight_bytes

GIB = 2**30
CONTEXT_DEFAULT = 16_384
"""Tokens of context that room is made for if nothing is asked, at most: memory for more would mostly lie idle."""
SEQUENCES_DEFAULT = 4
"""Sequences of that length that room is made for at a time; shorter ones leave room for more."""

_SURE = 0.9
"""Of the longest context that fits: vLLM does not start where its cache is a block too small for one sequence."""


def parameters_words(architecture: Architecture) -> str:
    """``8.03 billion parameters``."""
    count = architecture.parameters
    return f"{count / 1e9:.2f} billion parameters" if count >= 1e9 else f"{count / 1e6:.0f} million parameters"


@dataclass(frozen=True)
class Source:
    """What is known of a model's files."""

    name: str
    """``org/name``, or a folder."""
    architecture: Architecture
    file_bytes: int = 0
    """Size of its weights' files; 0: not known."""
    revision: str = ""
    """The commit that it was looked up at."""
    license: str = ""
    gated: bool = False

    @property
    def doubt(self) -> str:
        """Where the files' size contradicts the configuration; ``""``: it does not."""
        counted = weight_bytes(self.architecture)
        if not self.file_bytes or 0.8 <= self.file_bytes / counted <= 1.25:
            return ""
        return (
            f"its files have {self.file_bytes / GIB:.1f} GiB, its config.json makes {counted / GIB:.1f} GiB "
            f"({parameters_words(self.architecture)}): the larger one is planned with"
        )


@dataclass(frozen=True)
class Wish:
    """What the model is to do; ``None``: the default."""

    context: int | None = None
    """Tokens, prompt and answer together."""
    sequences: int | None = None
    """Requests of that length at a time."""
    gpus: int | None = None
    quantization: str = ""
    """To be applied by the engine as it loads (vLLM's ``--quantization``)."""
    cache_element: float = 0.0
    """Bytes of one element of the cache; 0: as the weights' type."""
    element: float = 0.0
    """Bytes of one element of weights and cache in host memory; 0: as vLLM is started there."""


@dataclass(frozen=True)
class Room:
    """The devices of one node type."""

    name: str
    gpus: int
    gpu_bytes: int
    """Of each GPU."""
    host_bytes: int
    """For engines without a GPU."""


@dataclass(frozen=True)
class Fit:
    """How a model fits on one node type."""

    node_type: str
    engine: Estimate | None
    """``None``: it does not fit."""
    longest: int
    """Longest context of one sequence on these GPUs, in tokens."""
    because: str
    """Why it does not fit, or what was cut; ``""``: as asked."""


def fits(source: Source, rooms: Iterable[Room], wish: Wish) -> tuple[Fit, ...]:
    """One ``Fit`` for each node type, in their order."""
    return tuple(_fit(source, room, wish) for room in rooms)


def weights_of(source: Source, wish: Wish) -> int:
    """Bytes of all weights as the engine holds them: of the files, or of the configuration if the files are smaller
    than it makes them (an index that lies), or as quantized on loading."""
    if wish.quantization and not source.architecture.quantization:
        return weight_bytes(source.architecture, wish.quantization)
    counted = weight_bytes(source.architecture)  # of quantized weights the option names the program for them
    return max(source.file_bytes, counted) if source.doubt or not source.file_bytes else source.file_bytes


def _fit(source: Source, room: Room, wish: Wish) -> Fit:
    """The fewest GPUs that hold it with the context and sequences asked for.

    (1) numbers of GPUs that the node type has and that divide the model; (2) what is asked for fits; (3) nothing is
    asked for: with fewer sequences, then with a shorter context; (4) it does not fit.
    """
    architecture = source.architecture
    if not room.gpus:
        return _fit_host(source, room, wish)
    if wish.gpus is not None and wish.gpus > room.gpus:
        return Fit(room.name, None, 0, f"{wish.gpus} GPUs are asked for, a node has {room.gpus}")
    able = [n for n in _counts(room.gpus, wish.gpus) if divides(architecture, n)]  # (1)
    if not able:
        return Fit(room.name, None, 0, f"{wish.gpus} GPUs do not divide its {architecture.heads} attention heads")
    weights = weights_of(source, wish)
    context = wish.context or min(architecture.context, CONTEXT_DEFAULT)
    sequences = wish.sequences or SEQUENCES_DEFAULT
    if context > architecture.context:
        return Fit(room.name, None, 0, f"it was made for {architecture.context} tokens, {context} are asked for")
    longest = 0
    for gpus in able:
        most = longest_context(architecture, weights, gpus, room.gpu_bytes, wish.cache_element)
        longest = max(longest, most)
        for count in _sequences(sequences, wish.sequences is None):  # (2), (3)
            made = estimate(architecture, weights, gpus, context, count, wish.cache_element)
            if made.gib * GIB <= room.gpu_bytes:
                fewer = f"room for {count} sequences of {context} tokens" if count < sequences else ""
                return Fit(room.name, made, most, fewer)
    if wish.context is None and wish.sequences is None and longest >= min(2048, architecture.context):  # (3)
        gpus, tokens = able[-1], _round(int(longest * _SURE))
        made = estimate(architecture, weights, gpus, tokens, 1, wish.cache_element)
        return Fit(room.name, made, longest, f"room for one sequence of {tokens} tokens")
    return Fit(room.name, None, longest, _why(source, room, weights, able[-1], context, longest))  # (4)


def _fit_host(source: Source, room: Room, wish: Wish) -> Fit:
    """As ``_fit``, in host memory."""
    if wish.gpus:
        return Fit(room.name, None, 0, "its nodes have no GPUs")
    architecture = source.architecture
    context = wish.context or min(architecture.context, CONTEXT_DEFAULT)
    sequences = wish.sequences or SEQUENCES_DEFAULT
    if context > architecture.context:
        return Fit(room.name, None, 0, f"it was made for {architecture.context} tokens, {context} are asked for")
    for count in _sequences(sequences, wish.sequences is None):
        made = estimate_host(architecture, context, count, wish.element)
        if made.gib * GIB <= room.host_bytes:
            fewer = f"room for {count} sequences of {context} tokens" if count < sequences else ""
            return Fit(room.name, made, architecture.context, fewer)
    has = room.host_bytes / GIB
    return Fit(room.name, None, 0, f"it needs {made.gib:g} GiB of host memory, engines have {has:g} on a node")


def _counts(gpus: int, wished: int | None) -> Sequence[int]:
    return (wished,) if wished else [count for count in (1, 2, 4, 8, 16) if count <= gpus]


def _sequences(wanted: int, may_cut: bool) -> list[int]:
    found = [wanted]
    while may_cut and found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def _round(tokens: int) -> int:
    return tokens if tokens < 1024 else tokens // 1024 * 1024


def _why(source: Source, room: Room, weights: int, gpus: int, context: int, longest: int) -> str:
    has = room.gpu_bytes / GIB
    if not longest:
        return (
            f"its weights take {weights / gpus / GIB:.1f} GiB on each of {gpus} GPUs, beside the engine's own buffers; "
            f"a GPU has {has:g}"
        )
    return f"{context} tokens for as many sequences do not fit, one of {_round(longest)} would on {gpus} x {has:g} GiB"
