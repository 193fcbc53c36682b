"""Sleep and wake, and every doubt about them: the decisions, and the module against an engine that goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from gateway_plugin.paths import Layout
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env
from serve.agent.node import DevicesUnseen
from serve.agent.probe import Probe, ProbeFailed, client_context
from serve.agent.sleeping import (
    Asleep,
    Awake,
    Canary,
    Mib,
    Patience,
    Reload,
    Sleeper,
    canary_of,
    doubt_about_sleep,
    doubt_about_wake,
    holds_too_little,
    same_answer,
    used_mib_of,
)
from tests.support.agents import KEY, fake_model, private_layout
from tests.support.fake_memory import held_mib
from tests.support.fake_sleep import KEPT_MIB
from tests.support.ports import free_port

NOTED = Canary("Hello", (-0.25,))
MEMORY_MIB = 1024
PATIENT = Patience(sleep_s=20.0, wake_s=20.0, settle_s=0.3, answer_s=20.0)
IMPATIENT = Patience(sleep_s=2.0, wake_s=2.0, settle_s=0.3, answer_s=2.0)
"""For engines that hang: the others answer, however busy this machine is."""


@pytest.mark.parametrize(
    ("sleeping", "after", "doubt"),
    [
        (True, (700, 900), ""),
        (True, (8700, 8900), "asleep it freed 15300 MiB of its GPU 0; expected 15808 of 24000"),
        (True, (700, 24000), "asleep it freed 0 MiB of its GPU 1"),
        (False, (700, 900), "it was put to sleep and says that it is awake"),
    ],
)
def test_asleep_it_must_have_freed_each_of_its_gpus(sleeping: bool, after: Mib, doubt: str) -> None:
    assert doubt_about_sleep(sleeping, (24000, 24000), after, 24000).startswith(doubt)
    assert bool(doubt) == bool(doubt_about_sleep(sleeping, (24000, 24000), after, 24000))


def test_a_small_engine_may_keep_half_of_its_memory() -> None:
    assert not doubt_about_sleep(True, (1200,), (700,), 1000)
    assert doubt_about_sleep(True, (1200,), (701,), 1000)


def test_ranks_of_an_engine_with_several_gpus_may_keep_more() -> None:
    assert doubt_about_sleep(True, (24_000,), (8_000,), 24_000), "it kept 8000"
    assert not doubt_about_sleep(True, (24_000, 24_000), (8_000, 7_000), 24_000)
    assert doubt_about_sleep(True, (24_000, 24_000), (8_000, 9_000), 24_000)


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [
        ((24_700, 24_900), ""),
        ((16_700, 24_900), ""),
        ((16_700, 2_000), "it holds 1300 MiB of its GPU 1, of 24000 that its catalog entry gives it"),
    ],
)
def test_one_that_holds_less_than_half_of_what_it_is_given_is_not_to_sleep(loaded: Mib, reason: str) -> None:
    found = holds_too_little((700, 700), loaded, 24_000)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("sleeping", "after", "answered", "doubt"),
    [
        (False, 23_700, NOTED, ""),
        (False, 23_700, Canary("Hello", (-0.26,)), ""),
        (False, 24_300, NOTED, "awake it took 23600 MiB of its GPU 0, asleep it had freed 23000"),
        (False, 22_400, NOTED, ""),  # it had served long prompts before it slept
        (False, 17_900, NOTED, "awake it took 17200 MiB"),
        (False, 900, NOTED, "awake it took 200 MiB"),
        (False, 23_700, Canary("!!!!", (-0.25,)), "after its sleep it answers the same request differently"),
        (False, 23_700, Canary("Hello", (-0.5,)), "after its sleep it answers the same request differently"),
        (False, 23_700, Canary("Hello", (float("nan"),)), "after its sleep it answers the same request differently"),
        (False, 23_700, None, "after its sleep it answers the same request differently"),
        (True, 23_700, None, "it was woken and says that it sleeps"),
    ],
)
def test_awake_it_must_hold_what_it_had_freed_and_answer_as_before(
    sleeping: bool, after: int, answered: Canary | None, doubt: str
) -> None:
    found = doubt_about_wake(sleeping, (23_000,), (700,), (after,), NOTED, answered)
    assert found.startswith(doubt)
    assert bool(found) == bool(doubt)


def test_vectors_are_compared_by_their_distance() -> None:
    noted = Canary("", (0.5, -0.5, 0.0))
    assert same_answer(noted, Canary("", (0.51, -0.5, 0.0)))
    assert not same_answer(noted, Canary("", (0.5, 0.5, 0.0)))
    assert not same_answer(noted, Canary("", (0.5, -0.5)))
    assert not same_answer(noted, Canary("", (0.5, -0.5, float("nan"))))


@pytest.mark.parametrize("length", [1.0, 30.0])
def test_long_vectors_with_small_components_are_told_apart(length: float) -> None:
    """Those of a normalised vector of 4096 are all smaller than what a log probability may differ by."""
    each = length / 64.0
    noted = Canary("", (each, -each) * 2048)
    assert same_answer(noted, Canary("", (each * 1.01, -each) * 2048))
    assert not same_answer(noted, Canary("", (0.0, 0.0) * 2048))
    assert not same_answer(noted, Canary("", (each, each) * 2048))


@pytest.mark.parametrize(
    ("answer", "canary"),
    [
        ({"choices": [{"text": "Hi", "logprobs": {"token_logprobs": [-1]}}]}, Canary("Hi", (-1.0,))),
        ({"choices": [{"text": "Hi"}]}, Canary("Hi", ())),
        (
            {"choices": [{"message": {"content": "Hi"}, "logprobs": {"content": [{"logprob": -2.5}]}}]},
            Canary("Hi", (-2.5,)),
        ),
        ({"choices": [{"message": {"content": None}, "logprobs": None}]}, None),
        ({"choices": [{"text": "", "logprobs": {"token_logprobs": [-1.5]}}]}, Canary("", (-1.5,))),
        ({"choices": [{"text": "Hi", "logprobs": {"token_logprobs": [float("nan")]}}]}, None),
        ({"data": [{"embedding": [0.5, 1]}]}, Canary("", (0.5, 1.0))),
        ({"data": [{"embedding": "base64"}]}, None),
        ({"choices": []}, None),
        ([], None),
    ],
)
def test_what_is_compared_of_an_answer(answer: object, canary: Canary | None) -> None:
    assert canary_of(json.dumps(answer).encode()) == canary


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        yield made


@asynccontextmanager
async def an_engine(
    layout: Layout, folder: Path, *faults: str, task: Literal["generate", "embed"] = "generate", sleeps: bool = True
) -> AsyncIterator[tuple[Sleeper, Probe]]:
    """A fake engine with one GPU, started as the agent would start it."""
    memory = folder / "memory"
    options = ["--memory-marker", str(memory), "--memory-mib", str(MEMORY_MIB), "--enable-sleep-mode"]
    model = fake_model("tiny", task, *options, *(word for fault in faults for word in ("--sleep-fault", fault)), gpus=1)
    bind = Bind("127.0.0.1", free_port())
    tls = TlsFiles(layout.engine_key, layout.engine_certificate, layout.ca)
    argv = engine_argv(model, "", bind, tls, sleeps=sleeps)
    engine = subprocess.Popen(argv, env=engine_env(model, KEY, (0,), (), os.environ, sleeps=sleeps))
    probe = Probe(bind.address, client_context(layout), KEY)

    async def used() -> Mib:
        return (held_mib(memory),)

    try:
        while not await probe.listening():
            assert engine.poll() is None
            await asyncio.sleep(0.05)
        hangs = any(fault.endswith("-hangs") for fault in faults)
        yield Sleeper(probe, "tiny", task, used, IMPATIENT if hangs else PATIENT), probe
    finally:
        await probe.close()
        engine.kill()
        engine.wait()


@pytest.mark.process
@pytest.mark.parametrize("task", ["generate", "embed"])
async def test_it_sleeps_and_wakes_again_and_again(
    layout: Layout, tmp_path: Path, task: Literal["generate", "embed"]
) -> None:
    async with an_engine(layout, tmp_path, task=task) as (sleeper, _):
        noted = await sleeper.note()
        assert isinstance(noted, Canary)
        for _ in range(3):
            asleep = await sleeper.fall_asleep(MEMORY_MIB)
            assert isinstance(asleep, Asleep)
            assert asleep.freed_mib == (MEMORY_MIB - KEPT_MIB,)
            awake = await sleeper.wake(asleep, noted)
            assert isinstance(awake, Awake)
            assert awake.taken_mib == asleep.freed_mib


@pytest.mark.process
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("leak", "asleep it freed 0 MiB of its GPU 0"),
        ("never-sleeps", "says that it is awake"),
        ("sleep-500", "was answered 500: as it was told"),
        ("sleep-hangs", "no whole answer within 2 s"),
    ],
)
async def test_a_sleep_that_goes_wrong_ends_in_a_reload(
    layout: Layout, tmp_path: Path, fault: str, reason: str
) -> None:
    async with an_engine(layout, tmp_path, fault) as (sleeper, _):
        assert isinstance(await sleeper.note(), Canary)
        begun = time.monotonic()
        asleep = await sleeper.fall_asleep(MEMORY_MIB)
        assert isinstance(asleep, Reload)
        assert reason in asleep.reason
        assert time.monotonic() - begun < 15


@pytest.mark.process
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("leak-awake", f"awake it took {2 * MEMORY_MIB - KEPT_MIB} MiB"),
        ("gibberish", "answers the same request differently"),
        ("weights", "answers the same request differently"),
        ("nan", "answers the same request differently"),
        ("never-wakes", "says that it sleeps"),
        ("wake-500", "was answered 500: as it was told"),
        ("wake-hangs", "no whole answer within 2 s"),
        ("canary-hangs", "no whole answer within 2 s"),
    ],
)
async def test_a_wake_that_goes_wrong_ends_in_a_reload(layout: Layout, tmp_path: Path, fault: str, reason: str) -> None:
    async with an_engine(layout, tmp_path, fault) as (sleeper, _):
        noted = await sleeper.note()
        assert isinstance(noted, Canary)
        asleep = await sleeper.fall_asleep(MEMORY_MIB)
        assert isinstance(asleep, Asleep)
        begun = time.monotonic()
        awake = await sleeper.wake(asleep, noted)
        assert isinstance(awake, Reload)
        assert reason in awake.reason
        assert time.monotonic() - begun < 15


@pytest.mark.process
async def test_one_that_does_not_say_whether_it_sleeps_never_does(layout: Layout, tmp_path: Path) -> None:
    async with an_engine(layout, tmp_path, "nonsense") as (sleeper, _):
        assert await sleeper.note() == Reload("/is_sleeping was answered 200: asleep")


@pytest.mark.process
async def test_weights_thrown_away_are_noticed(layout: Layout, tmp_path: Path) -> None:
    """Sleep level 2."""
    async with an_engine(layout, tmp_path) as (sleeper, probe):
        noted = await sleeper.note()
        assert isinstance(noted, Canary)
        assert (await probe.call("POST", "/sleep?level=2", None, 30.0))[0] == 200
        woken = await sleeper.wake(Asleep((MEMORY_MIB - KEPT_MIB,), 0.0), noted)
        assert woken == Reload("after its sleep it answers the same request differently")


@pytest.mark.process
async def test_one_that_was_not_started_for_it_does_not_sleep(layout: Layout, tmp_path: Path) -> None:
    async with an_engine(layout, tmp_path, sleeps=False) as (sleeper, _):
        refused = await sleeper.fall_asleep(MEMORY_MIB)
        assert isinstance(refused, Reload)
        assert "/sleep" in refused.reason


@pytest.mark.process
async def test_an_engine_that_is_gone_is_in_doubt(layout: Layout, tmp_path: Path) -> None:
    async with an_engine(layout, tmp_path) as (sleeper, probe):
        with pytest.raises(ProbeFailed):
            await probe.call("POST", "/v1/completions", {"model": "tiny", "prompt": "@crash"}, 30.0)
        asleep = Asleep((MEMORY_MIB - KEPT_MIB,), 0.0)
        for result in (
            await sleeper.note(),
            await sleeper.fall_asleep(MEMORY_MIB),
            await sleeper.wake(asleep, NOTED),
        ):
            assert isinstance(result, Reload)


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 512; echo 80000", (512, 80000)),
        ("echo 512", "nvidia-smi: 512"),
        ("echo '[N/A]'", r"nvidia-smi: \[N/A\]"),
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("echo 1; echo 2; exit 9", "nvidia-smi: 1"),
        ("exec sleep 60", "said nothing for 0.5 s"),
        (None, "nvidia-smi: "),
    ],
)
async def test_memory_in_use_is_what_nvidia_smi_says_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, found: Mib | str
) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else str(tmp_path))
    if isinstance(found, tuple):
        assert await used_mib_of(("0", "GPU-1"), 30.0) == found
    else:
        with pytest.raises(DevicesUnseen, match=found):
            await used_mib_of(("0", "GPU-1"), 0.5 if "0.5 s" in found else 30.0)
