"""The fake engine does what it promises: other tests stand on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.edges import ROOT, chat
from tests.support.fake_memory import held_mib, peak_mib

pytestmark = pytest.mark.integration
PROGRAM = (sys.executable, "-m", "tests.support.fake_engine")


@contextmanager
def engine(*options: str, key: str = "") -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    environment = {**os.environ, "VLLM_API_KEY": key}
    child = subprocess.Popen((*PROGRAM, *options), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        assert child.stdout is not None
        address = child.stdout.readline().split()[1]
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=f"http://{address}", headers=headers, timeout=30) as client:
            yield child, client
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def ask(client: httpx.Client, text: str, **more: object) -> httpx.Response:
    return client.post("/v1/chat/completions", json=chat("tiny", text, **more))


def test_it_answers_as_openai_does() -> None:
    with engine("--model", "tiny", "--model", "alias", key="k") as (child, client):
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "alias"]
        content = ask(client, "hello @tokens=3").json()["choices"][0]["message"]["content"]
        assert content == f"tiny pid={child.pid} request=1 w1 w2"
        assert ask(client, "hello", stream=True).text.count("data: ") == 9
        assert client.post("/v1/completions", json={"model": "alias", "prompt": "x"}).json()["model"] == "alias"
        assert client.post("/v1/chat/completions", json=chat("other", "x")).status_code == 404
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 404
        assert client.post("/tokenize", json={"model": "tiny", "prompt": "a b"}).json()["count"] == 2
        assert httpx.post(str(client.base_url) + "/v1/completions", json={"model": "tiny"}).status_code == 401


def test_it_embeds() -> None:
    with engine("--model", "tiny", "--task", "embed") as (_, client):
        answer = client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b", "a"]}).json()
        first, second, third = (each["embedding"] for each in answer["data"])
        assert first == third != second
        assert sum(x * x for x in first) == pytest.approx(1)
        assert ask(client, "x").status_code == 404


def test_it_loads_slowly_seen_or_unseen() -> None:
    begin = time.monotonic()
    with engine("--model", "tiny", "--load-delay-s", "2", "--load-visibly") as (_, client):
        assert client.get("/health").status_code == 503
        while client.get("/health").status_code != 200:
            assert time.monotonic() - begin < 60
    begin = time.monotonic()
    with engine("--model", "tiny", "--load-delay-s", "0.6") as (_, client):
        assert time.monotonic() - begin > 0.6
        assert client.get("/health").status_code == 200


def test_it_crashes() -> None:
    done = subprocess.run((*PROGRAM, "--crash-on-start"), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 3
    assert "asked to crash on start" in done.stderr
    with engine("--model", "tiny", "--crash-after-requests", "1") as (child, client):
        assert ask(client, "hello").status_code == 200
        with pytest.raises(httpx.TransportError):
            ask(client, "hello")
        assert child.wait(30) == -signal.SIGKILL
    for text in ("@crash", "@crash-mid-stream"):
        with engine("--model", "tiny") as (child, client), pytest.raises(httpx.TransportError):
            ask(client, text, stream=True)


def test_it_hangs() -> None:
    with engine("--model", "tiny", "--hang-after", "1") as (child, client):
        assert ask(client, "hello").status_code == 200
        client.timeout = httpx.Timeout(0.5)
        for path in ("/health", "/v1/models"):
            with pytest.raises(httpx.ReadTimeout):
                client.get(path)
        assert child.poll() is None


def test_it_stops_when_told_unless_it_is_stubborn() -> None:
    with engine("--model", "tiny", "--children", "2") as (child, _):
        of_child = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(of_child) == 2
        child.terminate()
        assert child.wait(30) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in of_child)
    with engine("--model", "tiny", "--ignore-sigterm") as (child, _):
        child.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)


def test_memory_is_counted_and_not_over_committed(tmp_path: Path) -> None:
    options = ("--memory-marker", str(tmp_path), "--memory-mib", "60", "--memory-room-mib", "100")
    with engine("--model", "tiny", *options) as (child, _):
        assert held_mib(tmp_path) == 60
        second = subprocess.run((*PROGRAM, *options), capture_output=True, text=True, cwd=ROOT, check=False)
        assert second.returncode == 9
        assert "out of memory" in second.stderr
        child.kill()
        child.wait()
        assert held_mib(tmp_path) == 0
        assert peak_mib(tmp_path) == 120
    with engine("--model", "tiny", *options):
        assert held_mib(tmp_path) == 60
