"""Warm and cold switches of a real vLLM on a GPU, with the agent's own code: what works, and how long it takes.

One engine of 8 billion parameters serves most tests; they run in this order. ``make test-gpu`` shows the figures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import ssl
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from gateway_plugin.paths import Layout
from serve.agent.sleeping import Reload
from tests.gpu.engines import SIZES, Completion, Engine, Figures, first_gpu, host_used_mib, make
from tests.support.agents import KEY, NAMED, engine_client, private_layout

GPU = first_gpu()
ROUNDS = 3
_START_S = 400.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(isinstance(GPU, str), reason=str(GPU)),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


@pytest.fixture(scope="module")
def figures() -> Figures:
    return Figures()


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        yield made


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory, layout: Layout, figures: Figures) -> Iterator[Engine]:
    """Started with nothing compiled; awake between tests."""
    engine = make("alpha", "8b", tmp_path_factory.mktemp("alpha"), layout)
    try:
        begun = time.monotonic()
        free_mib = engine.used_mib()
        figures("nvidia-smi", took_s=time.monotonic() - begun, used_mib=free_mib, host_mib=host_used_mib())
        took_s = engine.start(_START_S)
        figures("cold start, nothing compiled", size="8b", took_s=took_s, took_mib=engine.used_mib() - free_mib)
        yield engine
    finally:
        engine.stop()


def test_asleep_it_frees_its_memory_and_awake_it_answers_as_before(alpha: Engine, figures: Figures) -> None:
    assert alpha.canary.text
    for _ in range(ROUNDS):
        asleep = alpha.sleep()
        kept_mib, host_mib = alpha.used_mib(), host_used_mib()
        awake = alpha.wake()
        figures(
            "asleep and awake",
            size=alpha.size.name,
            sleep_s=asleep.took_s,
            wake_s=awake.took_s,
            freed_mib=asleep.freed_mib[0],
            kept_mib=kept_mib,
            host_asleep_mib=host_mib,
            host_awake_mib=host_used_mib(),
        )
        assert asleep.freed_mib[0] > alpha.size.weights_gib * 1024


def test_what_is_in_flight_ends_before_it_sleeps(alpha: Engine, figures: Figures) -> None:
    streams = [Completion(alpha, "Hi", 500) for _ in range(8)]
    assert all(stream.begun.wait(60) for stream in streams)
    asked = time.monotonic()
    alpha.sleep()
    slept = time.monotonic()
    for stream in streams:
        stream.join(10)
    last = max(stream.ended_at for stream in streams)
    figures("asleep after its streams", asked_before_last_s=last - asked, after_last_s=slept - last)
    assert [stream.tokens for stream in streams] == [500] * 8
    alpha.wake()


def test_a_request_that_comes_while_it_sleeps_has_no_answer_before_it_is_awake(alpha: Engine) -> None:
    """vLLM holds it: whoever sends to a sleeper waits, and is not told."""
    alpha.sleep()
    held = Completion(alpha, "Hi", 5)
    assert not held.begun.wait(2)
    alpha.wake()
    held.join(30)
    assert held.tokens == 5


def test_after_long_prompts_it_wakes_though_it_takes_less_memory_than_it_freed(alpha: Engine, figures: Figures) -> None:
    long = [Completion(alpha, " ".join(f"w{7 + 3900 * i + j}" for j in range(3900)), 4) for i in range(12)]
    for prompt in long:
        prompt.join(60)
    assert [prompt.tokens for prompt in long] == [4] * 12
    asleep = alpha.sleep()
    figures("long prompts, then asleep", freed_mib=asleep.freed_mib[0], taken_mib=alpha.wake().taken_mib[0])


def test_a_stranger_without_a_certificate_cannot_put_it_to_sleep(alpha: Engine, layout: Layout) -> None:
    """vLLM's development endpoints ask for no key: the certificate is what guards them."""
    with engine_client(layout, alpha.address) as agent:
        assert agent.get("/is_sleeping", headers={"authorization": ""}, extensions=NAMED).json() == {
            "is_sleeping": False
        }
    with (
        engine_client(layout, alpha.address, KEY, ssl.create_default_context(cafile=layout.ca)) as stranger,
        pytest.raises(httpx.HTTPError),
    ):
        stranger.post("/sleep", extensions=NAMED)


def test_weights_that_are_lost_are_noticed(alpha: Engine, figures: Figures) -> None:
    """Sleep level 2 keeps no weights: awake again it answers anything, as after a sleep that went wrong."""
    asleep = alpha.sleep()
    alpha.wake()
    assert alpha.post("/sleep?level=2&mode=wait") == 200
    woken = alpha.loop.run_until_complete(alpha.sleeper.wake(asleep, alpha.canary))
    figures("awake without weights", result=type(woken).__name__, reason=getattr(woken, "reason", ""))
    alpha.stop()
    assert isinstance(woken, Reload)


def test_a_second_start_finds_what_was_compiled_and_the_same_weights(alpha: Engine, figures: Figures) -> None:
    noted = alpha.canary
    alpha.stop()
    took_s = alpha.start(_START_S)
    figures("cold start, compiled before", size=alpha.size.name, took_s=took_s, canary=alpha.canary.text)
    assert alpha.canary.text == noted.text


@pytest.mark.parametrize("size", ["32b", "8b-wide"])
def test_two_engines_take_turns_on_one_gpu(
    alpha: Engine, size: str, tmp_path: Path, layout: Layout, figures: Figures
) -> None:
    needed_mib = int(SIZES[size].memory_gib * 1024) + 4096
    if needed_mib > alpha.gpu.total_mib:
        pytest.skip(f"the GPU has {alpha.gpu.total_mib} MiB; {size} beside a sleeper takes {needed_mib}")
    if psutil.virtual_memory().total >> 30 < 1.5 * (SIZES[size].weights_gib + alpha.size.weights_gib):
        pytest.skip(f"host memory of {psutil.virtual_memory().total >> 30} GiB is too little for both asleep")
    alpha.sleep()
    beta = make("beta", size, tmp_path, layout)
    try:
        figures("cold start beside a sleeper", size=size, took_s=beta.start(_START_S), used_mib=beta.used_mib())
        switches: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            falls, wakes = beta.sleep(), alpha.wake()
            back_falls, back_wakes = alpha.sleep(), beta.wake()
            switches.append((falls.took_s + wakes.took_s, back_falls.took_s + back_wakes.took_s))
            figures(
                "switch",
                size=size,
                sleep_s=falls.took_s,
                wake_8b_s=wakes.took_s,
                sleep_8b_s=back_falls.took_s,
                wake_s=back_wakes.took_s,
                host_mib=host_used_mib(),
            )
        to_alpha, back = (statistics.median(column) for column in zip(*switches, strict=True))
        figures("switches", size=size, to_8b_s=to_alpha, back_s=back, stop_s=beta.stop())
        assert alpha.wake().taken_mib
    finally:
        beta.stop()


def test_an_engine_sees_only_the_gpu_that_it_was_given(tmp_path: Path, layout: Layout) -> None:
    """The others run by their GPU's UUID; one that is given a GPU which is not there finds none."""
    lost = make("lost", "tiny", tmp_path, layout)
    lost.gpu = dataclasses.replace(lost.gpu, uuid="GPU-00000000-0000-0000-0000-000000000000")
    try:
        lost.launch()
        assert lost.process is not None
        assert lost.process.wait(180) != 0
    finally:
        lost.stop()
