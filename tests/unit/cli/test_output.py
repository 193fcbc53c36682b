"""Others' text on its way to a terminal: every way out is the filtered one."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from gateway_plugin.cli import chat, output, service
from gateway_plugin.cli.main import cli
from gateway_plugin.cli.output import Answer, Settings, Steps, make_table, put, put_json, report_error, text
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout
from tests.support.answering import answering

EVIL = "a\x1b]52;c;AAAA\x1b\\b\x1b[2Jc\x9b2Jd\x07\x08\x7fe"
SEEN = "abcde"


@pytest.fixture(autouse=True)
def _running(tmp_path: Path) -> Iterator[None]:
    with click.Context(cli, obj=Settings(tmp_path)).scope():
        yield


def test_nothing_is_printed_but_through_the_one_module() -> None:
    found = []
    for path in sorted(Path(output.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.name == "output.py":
                continue
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] in ("echo", "secho", "echo_via_pager", "print", "print_json", "write"):
                found.append(f"{path.name}:{node.lineno} {called}")
    assert [line for line in found if not line.endswith(" shown.write")] == []  # Answer


def test_lines_errors_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    put(EVIL)
    report_error(GatewayError(EVIL), as_json=False)
    with Steps("loading") as steps:
        steps.update([("m", "failed", EVIL)], 1.0)
    shown = capsys.readouterr()
    assert shown.out == f"{SEEN}\n"
    assert shown.err == f"error: {SEEN}\n   1.0 s  m: failed ({SEEN})\n"


def on_terminal(part: Any) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200, highlight=False, color_system=None).print(part)
    return out.getvalue()


def test_tables_and_lines_for_rich() -> None:
    link = "[link=http://evil.example]here[/link]"
    for part in (make_table(("model", "reason"), [("m", EVIL)], EVIL), text(EVIL), text(link)):
        shown = on_terminal(part)
        assert not set(shown) & set("\x1b\x9b\x07\x08\x7f")
    assert SEEN in on_terminal(make_table(("model", "reason"), [("m", EVIL)]))
    assert link in on_terminal(text(link))


def test_the_status_takes_no_markup_from_others() -> None:
    kinds = [{"type": "t", "running": 0, "pending": 1, "max": 2, "trouble": "[/x] [link=u]l[/link]", "retry_in_s": 1}]
    found: dict[str, Any] = {
        "state": "ready", "url": "http://[::1]:1", "site": "s", "host": "h", "parts": {}, "gateway": {"types": kinds},
        "gateway_error": None, "routes": [],
    }  # fmt: skip
    shown = "".join(map(on_terminal, service._status_parts(found)))
    assert "[/x] [link=u]l[/link]" in shown
    assert "http://[::1]:1" in shown
    found |= {"gateway": None, "gateway_error": EVIL}
    assert not set("".join(map(on_terminal, service._status_parts(found)))) & set("\x1b\x9b\x07")


def test_json_escapes_every_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    put_json({"reason": EVIL})
    shown = capsys.readouterr().out
    assert all(" " <= c <= "~" or c == "\n" for c in shown)
    assert json.loads(shown)["reason"] == EVIL


class Client:
    """Streams these pieces, whatever it is asked."""

    def __init__(self, *pieces: str) -> None:
        deltas = [
            SimpleNamespace(content=piece, tool_calls=None, function_call=None, model_extra={}) for piece in pieces
        ]
        chunks = [SimpleNamespace(choices=[SimpleNamespace(delta=d, finish_reason=None)]) for d in deltas]
        self.openai = SimpleNamespace(
            chat=SimpleNamespace(completions=SimpleNamespace(create=lambda **_: iter(chunks)))
        )


PIECES = ("Paris", "\x1b", "]52;c;", "AAAA\x1b", "\\ is", " nice\r", "\n\x1b[", "2J.\x1b[31mred", "\ud83d")


def test_a_models_answer_on_a_terminal_is_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = chat._stream(Client(*PIECES), "m", {}, [])  # type: ignore[arg-type]
    assert capsys.readouterr().out == "Paris is nice\n.red\ufffd\n"
    assert said == "".join(PIECES)  # what the conversation goes on with


def test_a_models_answer_in_a_pipe_is_data(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    chat._stream(Client(*PIECES[:-1]), "m", {}, [])  # type: ignore[arg-type]
    assert capfdbinary.readouterr().out == "".join(PIECES[:-1]).encode() + b"\n"


def test_an_answer_that_ends_within_a_sequence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = Answer()
    shown.write("so be it\x1b]0;t")
    shown.end()
    assert capsys.readouterr().out == "so be it0;t\n"


def test_logs_and_lists(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()
    layout.supervisor_log.write_text(f"before\n{EVIL}\n")
    (layout.logs / "block-b1.log").write_text(f"{EVIL}\n")
    model = {"id": "m", "task": "generate", "state": "failed", "aliases": [], "reason": EVIL}
    with answering(layout.state, **{"GET /v1/models": [{"data": [model]}]}):
        for command in (["logs", "supervisor"], ["blocks", "logs", "b1"], ["models", "list"]):
            done = CliRunner().invoke(cli, ["--state", str(layout.state), *command], catch_exceptions=False)
            assert (done.exit_code, SEEN in done.stdout) == (0, True), done.output
            assert not set(done.stdout) & set("\x1b\x9b\x07\x08\x7f")


def test_logs_hide_the_secrets_of_the_catalog_in_force(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.make()
    (layout.engine_logs / "e1.log").parent.mkdir(exist_ok=True)
    (layout.engine_logs / "e1.log").write_text("token hf_abcdefgh spawn\n")
    (layout.logs / "block-b1.log").write_text("token hf_abcdefgh spawn\n")
    entry = {"source": "x", "memory_gib": 1, "env": {"HF_TOKEN": "hf_abcdefgh", "KIND": "spawn"}}
    layout.catalog_json.write_text(json.dumps({"models": {"m": entry}}))
    for command in (["logs", "engine:e1"], ["logs", "engine:e1", "--json"], ["blocks", "logs", "b1"]):
        done = CliRunner().invoke(cli, ["--state", str(layout.state), *command], catch_exceptions=False)
        assert "token *** spawn" in done.stdout
        assert "hf_abcdefgh" not in done.stdout
    layout.catalog_json.write_text("{")
    done = CliRunner().invoke(cli, ["--state", str(layout.state), "logs", "engine:e1"], catch_exceptions=False)
    assert done.exit_code == 0
