"""``gateway down --grace``: requests in flight end, waiters are told, and a second Ctrl-C ends it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.gateways import ROOT, Gateway, chat_body, fake_model, gateway, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def down() -> Iterator[Gateway]:
    with gateway(
        lambda memory: {
            "warm": fake_model(memory, "--token-rate", "10", memory_gib=0.2),
            "slow": fake_model(memory, "--load-delay-s", "60", memory_gib=0.2),
        },
        start=False,
    ) as made:
        yield made


@pytest.fixture
def running(down: Gateway) -> Gateway:
    """Up, with a warm model. Each test ends it."""
    down.up()
    assert json.loads(down.cli("status", "--json").stdout)["state"] == "ready", "'up' said that it is"
    assert down.chat("warm").status_code == 200
    return down


class Stream:
    """One request in a thread: when and how it ended."""

    def __init__(self, made: Gateway, model: str, prompt: str) -> None:
        self.ended_at = 0.0
        self.end = ""
        self.begun = threading.Event()
        self._client = made.client()
        self._body = chat_body(model, prompt, stream=True, max_tokens=1000)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=self._body) as answer:
                text = b""
                for piece in answer.iter_bytes():
                    text += piece
                    self.begun.set()
            self.end = "whole" if b"[DONE]" in text else f"{answer.status_code} {text.decode()}"
        except httpx.TransportError as error:
            self.end = type(error).__name__
        self.ended_at = time.monotonic()

    def joined(self) -> str:
        self.thread.join(60)
        return self.end


def started_down(made: Gateway, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(made.layout.state), "down", *options]
    return subprocess.Popen(
        argv, env=made.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def shut(made: Gateway) -> bool:
    with made.client() as client:
        return client.get("/health").status_code == 503


def test_a_stream_in_flight_ends_and_waiters_are_told_at_once(running: Gateway) -> None:
    began = time.monotonic()
    stream = Stream(running, "warm", "@tokens=150")
    assert stream.begun.wait(30)
    waiter = Stream(running, "slow", "hello")
    wait_for(lambda: running.status()["waiting"] == 1, 10, "one waits for its model")
    supervisor = json.loads(running.layout.supervisor_status.read_text())
    child = started_down(running, "--grace", "30", "--json")
    wait_for(lambda: shut(running), 30, "the front door is shut")
    error = running.chat("warm").json()["error"]
    assert (error["code"], error["state"]) == ("going_down", "going_down")
    assert "going_down" in waiter.joined()
    assert stream.thread.is_alive(), "the waiter was told while the stream went on"
    assert json.loads(running.cli("status", "--json", check=False).stdout)["state"] == "stopping"
    now = json.loads(running.layout.supervisor_status.read_text())
    assert now["parts"] == supervisor["parts"], "nothing was started again"
    assert stream.joined() == "whole"
    assert stream.ended_at - began > 14
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    document = json.loads(out)
    assert (document["outcome"], document["in_flight"], document["cut"]) == ("ended", 2, 0)
    told = [json.loads(line)["draining"] for line in err.splitlines()]
    assert max(said["in_flight"] for said in told) == 2
    assert 25 < told[0]["left_s"] <= 30
    assert running.processes() == []


def test_a_grace_shorter_than_the_stream_cuts_it_then_without_a_supervisor_too(running: Gateway) -> None:
    stream = Stream(running, "warm", "@tokens=600")
    assert stream.begun.wait(30)
    os.kill(json.loads(running.layout.supervisor_status.read_text())["supervisor"]["pid"], signal.SIGKILL)
    began = time.monotonic()
    done = running.cli("down", "--grace", "2")
    assert stream.joined() in ("RemoteProtocolError", "ReadError")
    drained_s = stream.ended_at - began  # with the start of the command
    assert 2.0 <= drained_s < 40.0, "the stream takes a minute"
    assert "of 1 requests in flight 0 ended by themselves, 1 were cut" in done.stdout
    assert "requests: draining (1 in flight" in done.stderr
    assert "no process and no socket is left" in done.stdout
    assert running.processes() == []
    assert "nothing ran" in running.cli("down").stdout
    assert running.cli("status", check=False).returncode == 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


def test_a_second_ctrl_c_ends_it_at_once(running: Gateway) -> None:
    stream = Stream(running, "warm", "@tokens=600")
    assert stream.begun.wait(30)
    child = started_down(running, "--grace", "120")
    wait_for(lambda: shut(running), 30, "it drains")
    child.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert child.poll() is None
    assert stream.thread.is_alive()
    child.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    assert stream.joined() in ("RemoteProtocolError", "ReadError")
    assert stream.ended_at - pressed < 20.0, "of the two minutes given"
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "Ctrl-C once more cuts them" in err
    assert "1 were cut" in out
    assert running.processes() == []
