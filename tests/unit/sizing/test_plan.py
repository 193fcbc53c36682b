"""Where a model fits: what is planned is never more than there is, and more is asked only when less does not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.sizing.architecture import Architecture, parse_config
from gateway_plugin.sizing.estimate import divides, estimate_host
from gateway_plugin.sizing.plan import GIB, Fit, Room, Source, Wish, fits, weights_of
from tests.unit.sizing.published import PUBLISHED

A100 = Room("a100", 4, 38 * GIB, 0)
H100 = Room("h100", 8, 76 * GIB, 0)
CPU = Room("cpu", 0, 0, 3 * GIB)


def architecture(name: str) -> Architecture:
    return parse_config(PUBLISHED[name][1])


def plan(name: str, room: Room, **wish: object) -> Fit:
    return fits(Source(name, architecture(name)), (room,), Wish(**wish))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "room", "gpus"),
    [
        ("Llama-3.1-8B", A100, 1),
        ("Llama-3.3-70B", A100, 4),
        ("Llama-3.3-70B", H100, 2),
        ("Qwen3-235B-A22B", H100, 8),
        ("Qwen3-235B-A22B", A100, None),
        ("DeepSeek-V3", H100, None),
        ("all-MiniLM-L6-v2", CPU, 0),
        ("Llama-3.1-8B", CPU, None),
    ],
)
def test_where_published_models_fit(name: str, room: Room, gpus: int | None) -> None:
    engine = plan(name, room).engine
    assert (engine.gpus if engine else None) == gpus


@given(
    name=st.sampled_from(sorted(PUBLISHED)),
    gpus=st.sampled_from([1, 2, 4, 8]),
    gib=st.integers(8, 190),
    context=st.none() | st.integers(1, 200_000),
    sequences=st.none() | st.integers(1, 512),
)
def test_a_plan_keeps_to_what_there_is(
    name: str, gpus: int, gib: int, context: int | None, sequences: int | None
) -> None:
    room = Room("any", gpus, gib * GIB, 0)
    fit = plan(name, room, context=context, sequences=sequences)
    if fit.engine is None:
        assert fit.because
        return
    assert fit.engine.gib <= gib
    assert fit.engine.gpus <= gpus
    assert divides(architecture(name), fit.engine.gpus)
    assert fit.engine.context <= architecture(name).context
    assert context in (None, fit.engine.context)
    assert sequences in (None, fit.engine.sequences)
    larger = plan(name, replace(room, gpu_bytes=room.gpu_bytes + GIB), context=context, sequences=sequences)
    assert larger.engine is not None, "what fits into less fits into more"


def test_files_that_contradict_the_configuration_are_named_and_planned_with_the_larger() -> None:
    llama = architecture("Llama-3.1-8B")
    lies = Source("org/lies", llama, file_bytes=GIB)
    assert "1.0 GiB" in lies.doubt
    assert weights_of(lies, Wish()) == 2 * llama.parameters
    assert Source("org/fine", llama, file_bytes=16_060_556_376).doubt == ""


def test_what_does_not_fit_says_why() -> None:
    assert "262144" in plan("Llama-3.1-8B", A100, context=262_144).because
    assert "4 GPUs" in plan("DeepSeek-V3", A100).because
    assert "do not divide its 9" in plan("SmolLM2-135M", A100, gpus=2).because
    assert "a node has 4" in plan("Llama-3.1-8B", A100, gpus=8).because


@pytest.mark.parametrize(
    ("name", "context", "sequences", "measured_gib"),
    [("SmolLM2-135M", 2048, 6, 2.7), ("all-MiniLM-L6-v2", 256, 32, 1.5)],
)
def test_host_memory_is_predicted_within_15_percent(
    name: str, context: int, sequences: int, measured_gib: float
) -> None:
    """Measured: examples/models.yaml, all processes of the engine."""
    predicted = estimate_host(architecture(name), context, sequences).total / GIB
    assert predicted == pytest.approx(measured_gib, rel=0.15)
