"""``gateway down --grace``: requests in flight end, waiters are told, and a second Ctrl-C ends it at once.

In the order of the fewest starts: what one test ends another one finds down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import yaml

from tests.support.gateways import ROOT, Gateway, chat_body, fake_model, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
def warm(running: Gateway) -> Gateway:
    """Up, with a warm model. Each test ends it."""
    assert json.loads(running.cli("status", "--json").stdout)["state"] == "ready", "'up' said that it is"
    assert running.chat("warm").status_code == 200
    return running


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


def test_a_second_ctrl_c_ends_it_at_once(warm: Gateway) -> None:
    stream = Stream(warm, "warm", "@tokens=600")
    assert stream.begun.wait(30)
    child = started_down(warm, "--grace", "120")
    wait_for(lambda: shut(warm), 30, "it drains")
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
    assert warm.processes() == []


def test_up_without_options_reads_an_edited_catalog_again_after_down(service: Gateway) -> None:
    catalog = service.catalog.read_text()
    if not service.layout.service_json.exists():  # it was never up
        service.up()
    service.cli("down", "--grace", "0")
    service.catalog.write_text(yaml.safe_dump({"models": {"gamma": fake_model(service.folder / "memory")}}))
    service.cli("up")
    assert [model["name"] for model in json.loads(service.cli("models", "list", "--json").stdout)] == ["gamma"]
    service.catalog.write_text(catalog)
    assert f"models apply {service.catalog}" in service.cli("up").stderr
    service.cli("models", "apply", str(service.catalog))


def test_a_grace_shorter_than_the_stream_cuts_it_then_without_a_supervisor_too(warm: Gateway) -> None:
    stream = Stream(warm, "warm", "@tokens=600")
    assert stream.begun.wait(30)
    os.kill(json.loads(warm.layout.supervisor_status.read_text())["supervisor"]["pid"], signal.SIGKILL)
    began = time.monotonic()
    done = warm.cli("down", "--grace", "2")
    assert stream.joined() in ("RemoteProtocolError", "ReadError")
    drained_s = stream.ended_at - began  # with the start of the command
    assert 2.0 <= drained_s < 40.0, "the stream takes a minute"
    assert "of 1 requests in flight 0 ended by themselves, 1 were cut" in done.stdout
    assert "requests: draining (1 in flight" in done.stderr
    assert "no process and no socket is left" in done.stdout
    assert warm.processes() == []
    assert "nothing ran" in warm.cli("down").stdout
    assert warm.cli("status", check=False).returncode == 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{warm.url}/health")


def test_a_stream_in_flight_ends_and_waiters_are_told_at_once(warm: Gateway) -> None:
    began = time.monotonic()
    stream = Stream(warm, "warm", "@tokens=250")
    assert stream.begun.wait(30)
    waiter = Stream(warm, "slow", "hello")
    wait_for(lambda: warm.status()["waiting"] == 1, 10, "one waits for its model")
    supervisor = json.loads(warm.layout.supervisor_status.read_text())
    child = started_down(warm, "--grace", "50", "--json")
    wait_for(lambda: shut(warm), 30, "the front door is shut")
    error = warm.chat("warm").json()["error"]
    assert (error["code"], error["state"]) == ("going_down", "going_down")
    assert "going_down" in waiter.joined()
    assert stream.thread.is_alive(), "the waiter was told while the stream went on"
    assert json.loads(warm.cli("status", "--json", check=False).stdout)["state"] == "stopping"
    now = json.loads(warm.layout.supervisor_status.read_text())
    assert now["parts"] == supervisor["parts"], "nothing was started again"
    assert stream.joined() == "whole"
    assert stream.ended_at - began > 24
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    document = json.loads(out)
    assert (document["outcome"], document["in_flight"], document["cut"]) == ("ended", 2, 0)
    told = [json.loads(line)["draining"] for line in err.splitlines()]
    assert max(said["in_flight"] for said in told) == 2
    assert 40 < told[0]["left_s"] <= 50
    assert warm.processes() == []
