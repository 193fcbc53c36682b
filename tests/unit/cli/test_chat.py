"""``gateway chat``: what it prints of an answer, and what it says where there is none."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway_plugin.cli.main import cli
from tests.support.owner_doors import owner_door


class Thinker(BaseHTTPRequestHandler):
    """Thinks until ``max_tokens``; asked for a word, says one."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            vector: list[float] | str = [0.1, 0.2]
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(struct.pack("<2f", 0.1, 0.2)).decode()
            data = {"object": "list", "data": [{"index": 0, "embedding": vector}]}
            return self._send("application/json", json.dumps(data))
        speaks = body["messages"][-1]["content"] == "a word"
        said = {"content": "word"} if speaks else {"content": None, "reasoning": "Hm"}
        ended = "stop" if speaks or body["messages"][-1]["content"] == "only think" else "length"
        base = {"id": "1", "created": 0, "model": "m"}
        if body.get("stream"):
            chunk = {**base, "object": "chat.completion.chunk"}
            events: list[Any] = [{"index": 0, "delta": said, "finish_reason": None}]
            events += [{"index": 0, "delta": {}, "finish_reason": ended}]
            lines = [f"data: {json.dumps({**chunk, 'choices': [event]})}\n\n" for event in events]
            return self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))
        choice = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", **said}}
        self._send("application/json", json.dumps({**base, "object": "chat.completion", "choices": [choice]}))

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"id": "m", "object": "model", "state": "ready"}))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def thinker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    with owner_door(tmp_path, Thinker, "the-key"):
        yield


def command(state: Path, *arguments: str) -> Result:
    return CliRunner(env={"GATEWAY_URL": "", "GATEWAY_API_KEY": ""}).invoke(
        cli, ["--state", str(state), *arguments], catch_exceptions=False
    )


def chat(state: Path, *arguments: str) -> Result:
    return command(state, "chat", "m", *arguments)


@pytest.mark.process
def test_an_answer_is_printed(tmp_path: Path) -> None:
    done = chat(tmp_path, "a word")
    assert (done.exit_code, done.stdout) == (0, "word\n")


def test_an_answer_that_went_into_thinking_is_an_error(tmp_path: Path) -> None:
    done = chat(tmp_path, "think", "--max-tokens", "16")
    assert done.exit_code == 65
    assert done.stdout == ""
    assert "max_tokens while the model was thinking" in done.stderr


def test_thoughts_without_words_are_an_error(tmp_path: Path) -> None:
    done = chat(tmp_path, "only think")
    assert (done.exit_code, done.stdout) == (65, "")
    assert "thought and then said nothing" in done.stderr


def test_as_json_the_answer_says_by_itself_how_it_ended(tmp_path: Path) -> None:
    done = chat(tmp_path, "think", "--json")
    assert done.exit_code == 0
    (choice,) = json.loads(done.stdout)["choices"]
    assert (choice["finish_reason"], choice["message"]) == ("length", {"role": "assistant", "reasoning": "Hm"})


def test_a_vector_is_printed_as_the_engine_wrote_it(tmp_path: Path) -> None:
    done = command(tmp_path, "embed", "m", "a text")
    assert (done.exit_code, done.stdout) == (0, "[0.1, 0.2]\n")


def test_a_conversation_goes_on_without_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["think", "a word"])
    monkeypatch.setattr("gateway_plugin.cli.chat.read_terminal", lambda: True)
    monkeypatch.setattr("gateway_plugin.cli.chat._read_line", lambda: next(lines, None))
    done = chat(tmp_path)
    assert done.exit_code == 0
    assert "max_tokens" in done.stderr
    assert done.stdout == "word\n"
