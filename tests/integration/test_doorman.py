"""The doorman as it runs: HAProxy and a plain engine in one session, without an agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from gateway_plugin.engine_records import end_engines, engine_folder
from gateway_plugin.errors import ServiceError
from gateway_plugin.haproxy import binary
from gateway_plugin.paths import Layout
from gateway_plugin.processes import alive, group_members, mark
from serve.agent.doorman import _FILES_MIN, Doorman, behind, config, listener
from serve.agent.engines.start import Bind, TlsFiles
from serve.agent.records import record_path
from serve.core.events import EngineReady
from tests.support.agents import KEY, NAMED, AgentHost, engine_client, eventually, plain_model, private_layout
from tests.support.edges import running_edge, until
from tests.support.ports import free_port

pytestmark = pytest.mark.process
"""Every test starts processes."""
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        yield made


@dataclass
class Guarded:
    """An engine and its doorman."""

    layout: Layout
    process: subprocess.Popen[bytes]
    address: str

    @property
    def haproxy(self) -> psutil.Process:
        known = mark(self.process.pid)
        assert known is not None
        (found,) = (p for m in group_members(known) if (p := psutil.Process(m.pid)).name() == "haproxy")
        return found

    def client(self, key: str = KEY) -> httpx.Client:
        return engine_client(self.layout, self.address, key)


Start = Callable[..., Guarded]


@pytest.fixture
def start(layout: Layout, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def guarded(
        *options: str, wait: bool = True, health: str = "/health", deaf: bool = False, files: int = 0
    ) -> Guarded:
        inner = Bind("127.0.0.1", free_port())
        tls = TlsFiles(layout.engine_key, layout.engine_certificate, layout.ca)
        doorman = Doorman(inner, tls, KEY, health, deaf)
        engine = (
            sys.executable,
            "-m",
            "tests.support.fake_engine",
            "--port",
            str(inner.port),
            "--model",
            "m",
            *options,
        )
        argv, env = behind(doorman, engine, dict(os.environ))
        if files:
            argv = ("sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *argv)
        with listener("127.0.0.1") as door:
            process = subprocess.Popen(argv, env=env, start_new_session=True, stdin=door.fileno())
            started.append(process)
            made = Guarded(layout, process, f"127.0.0.1:{door.getsockname()[1]}")
        if wait:
            assert eventually(lambda: healthy(made))
        return made

    yield guarded
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def healthy(guarded: Guarded) -> bool:
    with contextlib.suppress(httpx.TransportError), guarded.client("") as client:
        return client.get("/health", extensions=NAMED, timeout=0.5).status_code == 200
    return False


def body(text: str, *, stream: bool = False) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "stream": stream}


def test_haproxy_has_nothing_to_say_about_its_configuration(layout: Layout) -> None:
    tls = TlsFiles(layout.engine_key, layout.engine_certificate, layout.ca)
    for inner in (Bind("127.0.0.1", 2), Bind("127.0.0.1", 0, "/tmp/e.sock")):
        for deaf, health in ((False, "/health"), (True, "/v1/models")):
            text = config(Doorman(inner, tls, KEY, health, deaf)).replace("fd@3", "127.0.0.1:1")
            assert KEY not in text
            done = subprocess.run(
                (str(binary()), "-c", "-f", "/dev/stdin"), input=text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert "WARNING" not in done.stderr, done.stderr


def test_where_few_files_may_be_open_it_starts_or_its_engine_says_why_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(files=_FILES_MIN).client() as client:
        assert client.post(CHAT, json=body("hi"), extensions=NAMED).status_code == 200
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, _FILES_MIN - 1))
    with pytest.raises(ServiceError, match=r"needs 256 open files, .* may have 255: raise the hard limit \(ulimit -Hn"):
        start()


def test_no_credential_reaches_the_engine(start: Start, tmp_path: Path) -> None:
    record = tmp_path / "seen.jsonl"
    guarded = start("--record", str(record))
    with guarded.client() as client:
        for path in (CHAT, "/v1/models", "/health?x=1"):
            client.post(path, json=body("hi"), headers={"x-api-key": KEY}, extensions=NAMED)
    lines = record.read_text().splitlines()
    assert len(lines) >= 2
    assert KEY not in record.read_text()
    names = {name for line in lines for name, _ in json.loads(line)["headers"]}
    assert not names & {"authorization", "x-api-key"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"authorization": KEY},
        {"authorization": f"bearer {KEY}"},
        {"authorization": f"Bearer {KEY},Bearer x"},
        {"x-api-key": KEY},
    ],
)
def test_only_the_whole_key_opens(start: Start, given: dict[str, str]) -> None:
    guarded = start()
    with guarded.client("") as client:
        asked = [("GET", path) for path in ("/metrics", "/health/", "//health", "/HEALTH")]
        for method, path in (*asked, ("POST", CHAT), ("POST", "/health")):
            answer = client.request(method, path, headers=given, extensions=NAMED)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, 401), path
        twice = [("authorization", f"Bearer {KEY}")] * 2
        assert client.get("/v1/models", headers=twice, extensions=NAMED).status_code == 401
        assert client.get("/health", extensions=NAMED).status_code == 200


def test_a_stream_comes_as_it_is_made_and_is_not_cut(start: Start) -> None:
    guarded = start("--token-rate", "10")
    begun = time.monotonic()
    at: list[float] = []
    with (
        guarded.client() as client,
        client.stream("POST", CHAT, json=body("@tokens=15", stream=True), extensions=NAMED) as answer,
    ):
        at += [time.monotonic() - begun for line in answer.iter_lines() if line]
    assert len(at) == 16
    assert at[0] < at[7] < at[14]
    assert at[14] - at[0] > 1.0


def test_an_engine_that_dies_is_no_answer_of_the_doormans(start: Start) -> None:
    """The edge tries another engine for a request without any byte of an answer: a 502 would go to the caller."""
    guarded = start()
    with guarded.client() as client, pytest.raises(httpx.TransportError):
        client.post(CHAT, json=body("@crash"), extensions=NAMED)


def test_another_path_of_health(start: Start) -> None:
    guarded = start(health="/v1/models")
    with guarded.client("") as client:
        assert "data" in client.get("/health", extensions=NAMED).json()


def test_who_is_deaf_while_it_works_is_healthy_meanwhile(start: Start) -> None:
    guarded = start("--hang-after", "0", wait=False, deaf=True)
    assert not eventually(lambda: healthy(guarded), 0.3)  # deaf without work: ill

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError), guarded.client() as client:
            client.post(CHAT, json=body("hi"), extensions=NAMED)

    asking = threading.Thread(target=ask)
    asking.start()
    assert eventually(lambda: healthy(guarded))
    os.killpg(guarded.process.pid, signal.SIGKILL)
    asking.join(10)


def test_its_end_is_the_engines_though_no_agent_watches(start: Start) -> None:
    guarded = start("--children", "1")
    known = mark(guarded.process.pid)
    assert known is not None
    guarded.haproxy.kill()
    guarded.process.wait(4)
    os.killpg(guarded.process.pid, signal.SIGKILL)  # as an agent does
    assert eventually(lambda: group_members(known) == ())


def test_the_engines_end_is_its_own_though_no_agent_watches(start: Start) -> None:
    if subprocess.run(("setpriv", "--pdeathsig", "KILL", "true"), check=False, capture_output=True).returncode:
        pytest.skip("setpriv of util-linux 2.33 or later")
    guarded = start()
    haproxy = guarded.haproxy
    guarded.process.kill()
    assert eventually(lambda: mark(haproxy.pid) is None)


def test_an_engine_that_ignores_sigterm_is_killed(start: Start) -> None:
    guarded = start("--ignore-sigterm")
    guarded.haproxy.kill()
    assert guarded.process.wait(30) == -signal.SIGKILL


def test_what_a_lost_agent_leaves_is_ended_with_the_block(layout: Layout) -> None:
    host = AgentHost(layout)
    try:
        host.start(plain_model(socket=True))
        host.wait(EngineReady)
        record = host.record()
        host.call(host.agent.shutdown(end_engines=False))
        folder = engine_folder(record_path(layout, record.engine))
        assert folder.is_dir()
        os.kill(record.pid, signal.SIGKILL)
        assert eventually(lambda: not alive(record.mark))
        assert end_engines(layout.engine_records) == ()
        assert group_members(record.mark) == ()
        assert not folder.exists()
    finally:
        host.close()


async def test_the_edge_sends_a_request_elsewhere_that_its_engine_did_not_answer() -> None:
    async with running_edge() as edge:
        edge.names["m"] = 0
        await edge.runtime.sync_slots(edge.names, (0,))
        host = await asyncio.to_thread(AgentHost, edge.layout)
        try:
            await asyncio.to_thread(host.start, plain_model("m", socket=True), key=edge.runtime.slot_key(0))
            ready = await asyncio.to_thread(host.wait, EngineReady)
            await edge.runtime.open(0, 0, ready.address)

            async def answered() -> bool:
                return "request=" in (await edge.ask("m", "hello")).text

            await until(answered, "the engine behind its doorman answers")
            lost = await edge.ask("m", "@crash")
            assert (lost.status_code, lost.json().get("cold")) == (200, True), lost.text
        finally:
            await asyncio.to_thread(host.close)
