"""The controller's watch over weights: what it reports, and its fetches, from a stand-in hub by the real client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.processes import mark
from serve.controller import weights
from serve.controller.weights import WeightsPlace, WeightsWatch
from serve.core.events import Event, WeightsFetching, WeightsMissing, WeightsThere
from serve.core.state import Fleet
from serve.core.step import initial
from tests.support.clocks import SLACK
from tests.support.fleets import a_policy
from tests.support.hub import CONFIG, SHA, Hub, Repository, serving

pytestmark = pytest.mark.process

MIB = 1 << 20
CONTENT = bytes(range(256)) * (6 * MIB // 256)


class Known:
    """A fleet with these models."""

    def __init__(self, *models: Model) -> None:
        self.fleet: Fleet = initial(a_policy())
        self.change(*models)

    def change(self, *models: Model) -> None:
        self.fleet = replace(self.fleet, models={model.name: model for model in models})


def entry(name: str, source: str, **fields: Any) -> Model:
    return Model(name=name, source=source, memory_gib=1, **fields)


ENTRY = entry("m", f"org/m@{SHA}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving({"org/m": Repository({"config.json": CONFIG, "model.safetensors": CONTENT})}) as found:
        found.here(monkeypatch, tmp_path / "hub")
        yield found


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30.0 * SLACK
    while not true():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.02)


def fetches_running() -> list[psutil.Process]:
    """The fetches of this process alone: a worker may own programs of other tests too."""
    running = []
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended and reaped between the list and the look
            if one.status() != psutil.STATUS_ZOMBIE and "gateway_plugin.fetch_process" in one.cmdline():
                running.append(one)
    return running


def test_what_is_missing_is_reported_once_and_what_comes_too(hub: Hub, tmp_path: Path) -> None:
    heard: list[Event] = []
    others = (entry("local", "/data/m"), entry("fake", "org/x", engine="command", command=["run"]))

    async def story() -> None:
        watch = WeightsWatch(Known(ENTRY, *others), heard.append, WeightsPlace("by-command", tmp_path / "hub"))
        await watch.look()
        await watch.look()
        (missing,) = heard
        assert isinstance(missing, WeightsMissing)
        assert (missing.model, missing.may_fetch) == ("m", False)
        assert missing.reason.endswith("an administrator runs 'gateway models fetch m'")
        assert str(tmp_path) not in missing.reason
        assert missing.detail.startswith(f"the weights of org/m@{SHA} are not in {tmp_path / 'hub'}")
        from gateway_plugin.fetching import fetch

        await asyncio.to_thread(fetch, "org/m", SHA, tmp_path / "hub")
        await watch.look()
        await watch.look()
        assert heard[1:] == [WeightsThere("m")]

    asyncio.run(story())


def test_a_fetch_reports_its_progress_and_its_end(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_REPORT_S", 0.1)
    hub.chunk_s = 0.005
    heard: list[Event] = []

    async def story() -> None:
        watch = WeightsWatch(Known(ENTRY), heard.append, WeightsPlace("on-request", tmp_path / "hub"))
        await watch.look()
        assert [event.may_fetch for event in heard if isinstance(event, WeightsMissing)] == [True]
        watch.fetch(ENTRY)
        watch.fetch(ENTRY)
        await until(lambda: isinstance(heard[-1], WeightsFetching))
        await watch.look()
        await until(lambda: heard[-1] == WeightsThere("m"))
        told = [event for event in heard if isinstance(event, WeightsFetching)]
        assert told[-1].total_bytes == len(CONTENT) + len(CONFIG)
        assert [event.done_bytes for event in told] == sorted(event.done_bytes for event in told)
        assert max(event.bytes_s for event in told) > 0
        assert len(heard) == 2 + len(told)
        await until(lambda: not fetches_running())

    asyncio.run(story())
    assert sum(hub.sent.values()) == len(CONTENT)


def test_a_fetch_that_fails_is_told_and_tried_again_later(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_RETRY_FIRST_S", 0.2)
    heard: list[Event] = []
    gone = entry("m", "org/gone")

    async def story() -> None:
        watch = WeightsWatch(Known(gone), heard.append, WeightsPlace("on-request", tmp_path / "hub"))
        watch.fetch(gone)
        await until(lambda: len(heard) == 2)
        watch.fetch(gone)
        await until(lambda: len(heard) == 4)

    asyncio.run(story())
    failed, again, _, _ = heard
    assert isinstance(failed, WeightsMissing)
    assert isinstance(again, WeightsMissing)
    assert (failed.may_fetch, again.may_fetch) == (False, True)
    assert "org/gone" not in failed.reason
    assert "The hub has no model 'org/gone'" in failed.detail


@pytest.mark.parametrize("after", [(), (entry("m", "/data/m"),), (entry("m", "org/m@main"),)])
def test_a_fetch_ends_with_its_source_in_the_catalog(hub: Hub, tmp_path: Path, after: tuple[Model, ...]) -> None:
    hub.chunk_s = 0.05
    heard: list[Event] = []
    known = Known(ENTRY)

    async def story() -> None:
        watch = WeightsWatch(known, heard.append, WeightsPlace("on-request", tmp_path / "hub"))
        watch.fetch(ENTRY)
        await until(lambda: sum(hub.sent.values()) > MIB)
        known.fleet = Known(*after).fleet
        await watch.look()
        await until(lambda: not fetches_running())
        expected = [WeightsThere, *([WeightsMissing] * sum("@main" in one.source for one in after))]

        def told() -> list[Event]:
            return [event for event in heard if not isinstance(event, WeightsFetching)]

        await until(lambda: len(told()) >= len(expected))
        await asyncio.sleep(0.2)
        assert sum(hub.sent.values()) < len(CONTENT)
        assert [type(event) for event in told()] == expected

    asyncio.run(story())


@pytest.mark.parametrize("program", [("/nowhere/fetch",), (sys.executable, "-c", "print('no JSON')")])
def test_a_fetch_that_cannot_be_run_is_told_too(tmp_path: Path, program: tuple[str, ...]) -> None:
    heard: list[Event] = []

    async def story() -> None:
        watch = WeightsWatch(Known(ENTRY), heard.append, WeightsPlace("on-request", tmp_path / "hub"), program)
        watch.fetch(ENTRY)
        await until(lambda: heard)

    asyncio.run(story())
    (failed,) = heard
    assert isinstance(failed, WeightsMissing)
    assert "the fetch could not be run" in failed.detail


@pytest.mark.parametrize("mended", ["fetched by a command", "another source", "no source"])
def test_what_is_mended_is_not_refused_until_the_next_try(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: str
) -> None:
    monkeypatch.setattr(weights, "_AGAIN_S", 0.05)
    heard: list[Event] = []
    by_command = mended == "fetched by a command"
    wrong = ENTRY if by_command else entry("m", "org/gone")
    if by_command:
        hub.repositories.pop("org/m")
    known = Known(wrong)

    async def story() -> None:
        watch = WeightsWatch(known, heard.append, WeightsPlace("on-request", tmp_path / "hub"))
        watch.fetch(wrong)
        await until(lambda: heard)
        assert isinstance(heard[0], WeightsMissing)
        from gateway_plugin.fetching import fetch

        if by_command:
            hub.repositories["org/m"] = Repository({"config.json": CONFIG, "model.safetensors": CONTENT})
            await asyncio.to_thread(fetch, "org/m", SHA, tmp_path / "hub")
        else:
            known.fleet = Known(ENTRY if mended == "another source" else entry("m", "/data/m")).fleet
        await until(lambda: len(heard) > 1)
        if mended == "another source":
            assert isinstance(heard[1], WeightsMissing)
            assert heard[1].may_fetch
        else:
            assert heard[1] == WeightsThere("m")

    asyncio.run(story())


def test_weights_that_come_by_hand_after_a_failure_end_the_wait(hub: Hub, tmp_path: Path) -> None:
    hub.status = 500
    heard: list[Event] = []
    known = Known(ENTRY)

    async def story() -> None:
        watch = WeightsWatch(known, heard.append, WeightsPlace("on-request", tmp_path / "hub"))
        await watch.look()
        watch.fetch(ENTRY)
        await until(lambda: len(heard) == 2)
        known.change(entry("m", ENTRY.source, gpus=1))  # the core forgets what it knew of the old entry
        await until(lambda: len(heard) == 3)
        assert heard[2] == heard[1]
        hub.status = 0
        from gateway_plugin.fetching import fetch

        await asyncio.to_thread(fetch, "org/m", SHA, tmp_path / "hub")
        await until(lambda: heard[-1] == WeightsThere("m"))

    asyncio.run(story())


def test_what_is_missing_is_reported_of_a_changed_entry_again(tmp_path: Path) -> None:
    heard: list[Event] = []
    known = Known(ENTRY)

    async def story() -> None:
        watch = WeightsWatch(known, heard.append, WeightsPlace("by-command", tmp_path / "hub"))
        await watch.look()
        known.change(entry("m", ENTRY.source, gpus=1))
        await watch.look()
        await watch.look()

    asyncio.run(story())
    assert len(heard) == 2
    assert heard[0] == heard[1]


_CONTROLLER = """
import asyncio, sys
from pathlib import Path
from serve.controller.weights import WeightsPlace, WeightsWatch
from tests.unit.controller.test_weights import ENTRY, Known
async def main():
    watch = WeightsWatch(Known(ENTRY), lambda event: None, WeightsPlace("on-request", Path(sys.argv[1])))
    watch.fetch(ENTRY)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_fetch_ends_with_its_controller(hub: Hub, tmp_path: Path, how: signal.Signals) -> None:
    hub.chunk_s = 0.05

    async def story() -> None:
        environment = {**os.environ, **hub.environment(tmp_path / "hub")}
        controller = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _CONTROLLER, str(tmp_path / "hub"), env=environment
        )
        await until(lambda: sum(hub.sent.values()) > MIB)
        (child,) = psutil.Process(controller.pid).children()
        controller.send_signal(how)
        await controller.wait()
        await until(lambda: mark(child.pid) is None)

    asyncio.run(story())


def test_the_program_says_what_it_does(hub: Hub, tmp_path: Path) -> None:
    async def run(*words: str) -> tuple[int | None, list[dict[str, Any]]]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway_plugin.fetch_process", *words,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        said = await process.stdout.read()
        return await process.wait(), [json.loads(line) for line in said.splitlines()]

    code, said = asyncio.run(run("org/m", "", str(tmp_path / "hub")))
    total = len(CONTENT) + len(CONFIG)
    assert (code, said[-1]) == (0, {"done_bytes": total, "total_bytes": total})
    code, said = asyncio.run(run("org/m", "gone", str(tmp_path / "hub")))
    assert (code, list(said[-1])) == (1, ["error"])
