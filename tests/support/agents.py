"""A node agent in a loop of its own, for tests that are plain functions."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from gateway_plugin.catalog import Model
from gateway_plugin.paths import Layout
from gateway_plugin.tls import ENGINE_NAME, make_authority
from serve.agent import records
from serve.agent.actor import AgentSettings, NodeAgent
from serve.agent.engine import EngineEvent
from serve.agent.probe import client_context
from serve.agent.records import EngineRecord
from serve.agent.timing import Timing
from serve.agent.warm import Gauges
from serve.core.effects import SleepEngine, StartEngine, StopEngine, WakeEngine
from serve.core.events import EngineExited, NodeJoined, NodeLeaves
from tests.support.clocks import SLACK

T = TypeVar("T")

QUICK = Timing(
    poll_s=0.02,
    probe_max_s=0.2,
    health_every_s=0.05,
    health_timeout_s=1.0,
    ill_after_s=2.0,
    first_answer_s=20.0,
    grace_s=0.5,
)
"""For fake engines, which a busy machine may keep waiting for a second."""
KEY = "engine-key-of-a-test-0123456789"


def own_block(node_type: str = "a") -> str:
    """A block's name that no other pytest process has: a block ends whatever carries its name on this machine."""
    return f"gw-{node_type}-{os.getpid():08x}"


def fake_model(name: str = "tiny", task: str = "generate", *options: str, **fields: Any) -> Model:
    """A catalog entry whose engine is the fake one."""
    command = ("{python}", "-m", "tests.support.fake_engine", "--host", "{host}", "--port", "{port}", "--model={names}")
    tls = (
        "--ssl-keyfile",
        "{keyfile}",
        "--ssl-certfile",
        "{certfile}",
        "--ssl-ca-certs",
        "{cafile}",
        "--ssl-cert-reqs",
        "2",
    )
    given = {"source": "none", "engine": "command", "memory_gib": 1, "aliases": (f"{name}-alias",), **fields}
    return Model.model_validate(
        {"name": name, "task": task, "command": (*command, *tls, "--task", task, *options), **given}
    )


def plain_model(
    name: str = "plain", task: str = "generate", *options: str, socket: bool = False, **fields: Any
) -> Model:
    """A catalog entry whose engine is the fake one without TLS and key: behind a doorman."""
    place = ("--uds", "{socket}") if socket else ("--host", "{host}", "--port", "{port}")
    command = ("{python}", "-m", "tests.support.fake_engine", *place, "--model={names}", "--task", task, *options)
    given = {"source": "/none", "engine": "command", "memory_gib": 1, "aliases": (f"{name}-alias",), **fields}
    return Model.model_validate({"name": name, "task": task, "command": command, **given})


@contextmanager
def private_layout() -> Iterator[Layout]:
    """A gateway's folders with certificates, under a short path (AF_UNIX); gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="gwa-", dir="/tmp"))
    before = os.environ.get("GATEWAY_RUN_ROOT")
    os.environ["GATEWAY_RUN_ROOT"] = str(root)
    try:
        layout = Layout(root / "state")
        layout.make()
        make_authority(layout)
        yield layout
    finally:
        if before is None:
            del os.environ["GATEWAY_RUN_ROOT"]
        else:
            os.environ["GATEWAY_RUN_ROOT"] = before
        shutil.rmtree(root)


class AgentHost:
    """Runs a ``NodeAgent`` in a thread with its own loop, and keeps what it reported."""

    def __init__(
        self,
        layout: Layout,
        node: str = "node1",
        timing: Timing = QUICK,
        gpu_mib: tuple[int, ...] = (),
        isolate: Literal["auto", "required", "off"] = "auto",
        sleep_mib: int | None = 0,
        gauges: Gauges | None = None,
        fetched: Path | None = None,
    ) -> None:
        self.fetched = fetched
        self.layout = layout
        self.sleep_mib = sleep_mib
        self.gauges = gauges
        self.isolate = isolate
        self.gpu_mib = gpu_mib
        self.node = node
        self.timing = timing
        self.seen: list[EngineEvent] = []
        self.notices: list[NodeLeaves] = []
        self._last = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.agent = self._new()
        self._children: list[subprocess.Popen[bytes]] = []

    def _new(self) -> NodeAgent:
        state = str(self.layout.state)
        settings = AgentSettings(
            self.node, "local", state, 4096, self.gpu_mib, on_loopback=True, isolate=self.isolate,
            fetched=self.fetched, sleep_mib=self.sleep_mib,
        )  # fmt: skip
        return NodeAgent(settings, self.timing, self.gauges)

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run ``work`` in the agent's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def start(
        self,
        model: Model,
        engine: str = "e1",
        epoch: int = 1,
        key: str = KEY,
        gpus: tuple[int, ...] = (),
        sleep_mib: int = 0,
    ) -> None:
        """Send ``StartEngine``."""
        self.call(self.agent.start(StartEngine(engine, self.node, model, gpus, 0, epoch, sleep_mib), key))

    def sleep(self, engine: str = "e1", epoch: int = 1) -> None:
        """Send ``SleepEngine``."""
        self.call(self.agent.sleep(SleepEngine(engine, self.node, epoch)))

    def wake(self, engine: str = "e1", epoch: int = 1) -> None:
        """Send ``WakeEngine``."""
        self.call(self.agent.wake(WakeEngine(engine, self.node, epoch)))

    def stop(self, engine: str = "e1", epoch: int = 1, reason: str = "evicted") -> None:
        """Send ``StopEngine``."""
        self.call(self.agent.stop(StopEngine(engine, self.node, epoch, reason)))

    def describe(self) -> NodeJoined:
        """The agent's report of its node."""
        return self.call(self.agent.describe())[0]

    def poll(self, wait_s: float = 0.0) -> None:
        """Receive the agent's reports since the last call."""
        self._last, events = self.call(self.agent.events(self._last, wait_s), wait_s + 30)
        self.seen += [event for event in events if not isinstance(event, NodeLeaves)]
        self.notices += [event for event in events if isinstance(event, NodeLeaves)]

    def wait(self, kind: type[T], engine: str = "e1", timeout_s: float = 15.0) -> T:
        """Wait for an event of this type about this engine; all events are kept. An unexpected exit fails at once."""
        deadline = time.monotonic() + timeout_s * SLACK
        while time.monotonic() < deadline:
            for event in self.seen:
                if event.engine == engine and isinstance(event, kind):
                    self.seen.remove(event)
                    return event
                if event.engine == engine and isinstance(event, EngineExited):
                    raise AssertionError(f"waited for {kind.__name__}, got {event}")
            self.poll(wait_s=min(1.0, max(0.0, deadline - time.monotonic())))
        raise AssertionError(f"no {kind.__name__} of {engine} within {timeout_s * SLACK} s; seen: {self.seen}")

    def crash(self) -> None:
        """The agent dies suddenly, and another is created on the same node."""
        for engine in self.agent._engines.values():  # still children of this process: kept, to be reaped
            if engine._child is not None:
                self._children.append(engine._child)
        self.call(self.agent.shutdown(end_engines=False))
        self.agent, self._last, self.seen = self._new(), 0, []

    def record(self, engine: str = "e1") -> EngineRecord:
        """The engine's record on disk."""
        return next(record for record in records.read_all(self.layout) if record.engine == engine)

    def close(self) -> None:
        """End every engine and the loop."""
        try:
            self.call(self.agent.shutdown())
        finally:
            for child in self._children:
                child.wait(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether ``condition`` came true within ``SLACK`` times the deadline."""
    deadline = time.monotonic() + timeout_s * SLACK
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def engine_client(layout: Layout, address: str, key: str = KEY, context: ssl.SSLContext | None = None) -> httpx.Client:
    """An HTTP client as the gateway's agent, or with another TLS context."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(
        base_url=f"https://{address}",
        verify=context or client_context(layout),
        headers=headers,
        timeout=120,
        trust_env=False,
    )


NAMED: dict[str, Any] = {"sni_hostname": ENGINE_NAME}
"""Request extension: the name that the engine's certificate is checked for."""
