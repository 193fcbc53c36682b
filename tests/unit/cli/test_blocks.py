"""``gateway blocks``: what it shows of the gateway's answer, what it asks for, what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.text import Text

from gateway_plugin.blocks.ledger import Block, BlockPhase, Ledger
from gateway_plugin.cli import blocks as commands
from gateway_plugin.cli.main import cli
from gateway_plugin.cli.output import make_table
from gateway_plugin.cli.service import _status_parts
from gateway_plugin.paths import Layout
from gateway_plugin.service.logs import block_logs, follow_all
from tests.support.answering import answering

NAME, OTHER = "gw-gpu-0a1b2c3d", "gw-gpu-4e5f6a7b"
CANCEL = "/gateway/v1/blocks/cancel"


def a_row(name: str = NAME, state: str = "serving", **fields: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("job", "reason", "host", "node", "starts_in_s", "ends_in_s", "leaves_in_s", "ended_s"))
    return {
        **empty, "name": name, "type": "gpu", "state": state, "phase": "running", "age_s": 75.0, "models": [],
        "in_flight": 0, **fields,
    }  # fmt: skip


SERVING = a_row(
    job="4711", host="n1", node="gpu-1-1", ends_in_s=3100.0, in_flight=3,
    models=[
        {"model": "smollm2-135m-instruct", "state": "ready", "in_flight": 3},
        {"model": "all-minilm", "state": "loading", "in_flight": 0},
    ],
)  # fmt: skip
PENDING = a_row(OTHER, "pending", phase="pending", job="4712", reason="Resources", starts_in_s=40.0)
ENDED = a_row("gw-gpu-99999999", "failed", phase="failed", ended_s=30.0, reason="its script left with exit code 3")


def gateway(state: Path, *arguments: str, **options: Any) -> Result:
    runner = CliRunner(env={"GATEWAY_URL": "", "GATEWAY_API_KEY": ""})
    return runner.invoke(cli, ["--state", str(state), "blocks", *arguments], catch_exceptions=False, **options)


def test_a_list_says_of_each_block_what_it_does_and_until_when(tmp_path: Path) -> None:
    with answering(tmp_path, blocks=[[SERVING, PENDING, ENDED]]):
        words = gateway(tmp_path, "list", "--all").stdout
        document = json.loads(gateway(tmp_path, "list", "--json").stdout)
    serving, pending, ended = [line for line in words.splitlines() if "gw-gpu" in line]
    assert "ends in 52 min" in serving
    assert "smollm2-135m-instruct (3 in flight), all-minilm (loading)" in serving
    assert all(word in pending for word in ("4712", "pending", "Resources", "starts in 40 s"))
    assert all(word in ended for word in ("failed", "ended 30 s ago", "exit code 3"))
    assert document[1]["starts_in_s"] == 40.0


def test_a_table_fits_a_terminal_of_100_columns_with_names_whole() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    rows = [commands._cells(row) for row in (SERVING, PENDING, ENDED)]
    console.print(make_table(commands._COLUMNS, rows, whole=commands._WHOLE))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    for name in (NAME, OTHER, "gw-gpu-99999999"):
        assert sum(name in line for line in lines) == 1


def test_cancel_says_what_is_cut_and_takes_several(tmp_path: Path) -> None:
    with answering(tmp_path, blocks=[[SERVING, PENDING]]) as made:
        done = gateway(tmp_path, "cancel", NAME, OTHER, NAME)
        assert made.told == [(CANCEL, {"block": NAME}), (CANCEL, {"block": OTHER})]
        document = json.loads(gateway(tmp_path, "cancel", NAME, "--json").stdout)
    assert done.exit_code == 0
    assert f"{NAME} is being ended; 3 requests in flight are cut" in done.stdout
    assert f"{OTHER} is being ended\n" in done.stdout
    assert document == [{"block": NAME, "done": "cancel", "state": "serving", "cut": 3}]


def test_cancel_asks_where_a_person_may_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "read_terminal", lambda: True)
    with answering(tmp_path, blocks=[[SERVING]]) as made:
        done = gateway(tmp_path, "cancel", NAME, input="n\n")
        assert (done.exit_code, made.told) == (1, [])
        assert f"{NAME}: serving; 3 requests in flight are cut" in done.stderr
        assert gateway(tmp_path, "cancel", NAME, input="y\n").exit_code == 0
        assert gateway(tmp_path, "cancel", NAME, "--yes").exit_code == 0
        assert len(made.told) == 2


@pytest.mark.parametrize(
    ("name", "says"), [("gw-gpu-99999999", "ended 30 s ago (failed)"), ("nobody", f"There are: {NAME}")]
)
def test_an_unknown_or_ended_block_cancels_none(tmp_path: Path, name: str, says: str) -> None:
    with answering(tmp_path, blocks=[[SERVING, ENDED]]) as made:
        done = gateway(tmp_path, "cancel", NAME, name)
        assert made.told == []
    assert done.exit_code == 66
    assert says in done.stderr
    assert "Nothing was cancelled" in done.stderr or "nothing was cancelled" in done.stderr


def test_drain_waits_until_the_block_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_POLL_S", 0.0)
    draining, leaving = {**SERVING, "state": "draining"}, a_row(state="leaving")
    story = [[draining], [draining], [leaving], [a_row(state="completed", ended_s=0.1)]]
    with answering(tmp_path, blocks=story) as made:
        done = gateway(tmp_path, "drain", "gpu-1-1", "--wait")  # by its node's name: forgotten before the block ends
    assert made.told == [("/gateway/v1/blocks/drain", {"block": "gpu-1-1"})]
    assert (done.exit_code, "has gone after" in done.stdout) == (0, True)
    assert [line.split(": ", 1)[1].split()[0] for line in done.stderr.splitlines()] == ["draining", "leaving"]


def test_drain_interrupted_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_until_gone", interrupted)
    with answering(tmp_path, blocks=[[SERVING]]):
        done = gateway(tmp_path, "drain", NAME, "--wait")
    assert done.exit_code == 130
    assert f"{NAME} goes on draining" in done.stderr


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.make()
    (layout.logs / f"block-{NAME}.log").write_text("Ray starts\nleaving: told to\n")
    (layout.block_scripts / f"{NAME}.170.9").write_text("#!/bin/bash\n")
    (layout.block_scripts / f"{NAME}.170.9.stdout").write_text("")
    (layout.block_scripts / f"{NAME}.170.9.stderr").write_text("slurmstepd: CANCELLED\n")
    return layout


def test_logs_are_the_blocks_own_and_its_jobs(tmp_path: Path, layout: Layout) -> None:
    words = gateway(tmp_path, "logs", NAME, "-n", "1").stdout.splitlines()
    assert [line for line in words if not line.startswith("==>")] == ["leaving: told to", "slurmstepd: CANCELLED"]
    document = json.loads(gateway(tmp_path, "logs", NAME, "--json").stdout)
    assert [entry["log"] for entry in document] == ["block", "job stderr", "job stdout"]
    assert document[0]["lines"] == ["Ray starts", "leaving: told to"]


def test_logs_of_a_block_in_the_queue_are_empty_and_of_an_unknown_one_name_those_there_are(
    tmp_path: Path, layout: Layout
) -> None:
    Ledger(layout.ledger).write({OTHER: Block(OTHER, "gpu", BlockPhase.PENDING, asked_at=5.0)})
    done = gateway(tmp_path, "logs", OTHER)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "has not written anything yet" in done.stderr
    for name in ("nobody", "*", "../nobody", "/etc/passwd"):
        done = gateway(tmp_path, "logs", name)
        assert done.exit_code == 66, done.output
        assert f"There are: {OTHER}, {NAME}." in done.stderr


def test_following_reads_on_and_takes_a_log_that_begins_later_from_its_start(layout: Layout) -> None:
    stderr = layout.block_scripts / f"{NAME}.170.9.stderr"
    stderr.unlink()
    looks = 0

    def files() -> Mapping[str, Path]:
        nonlocal looks
        looks += 1
        if looks == 2:
            with (layout.logs / f"block-{NAME}.log").open("a") as log:
                log.write("more\n")
            stderr.write_text("first\n")
        return block_logs(layout, NAME)

    lines = follow_all(files, poll_s=0.0)
    assert [next(lines), next(lines)] == [("block", "more"), ("job stderr", "first")]
    lines.close()


def test_retry_asks_for_a_type_of_block_again(tmp_path: Path) -> None:
    with answering(tmp_path, blocks=[[]]) as made:
        done = gateway(tmp_path, "retry", "gpu")
    assert made.told == [("/gateway/v1/blocks/retry", {"type": "gpu"})]
    assert (done.exit_code, done.stdout) == (0, "blocks of type gpu are asked for again\n")


def test_status_says_which_type_of_block_is_in_trouble_and_what_to_do() -> None:
    healthy = {"type": "cpu", "running": 1, "pending": 0, "max": 2, "trouble": None, "retry_in_s": None}
    ill = {**healthy, "type": "gpu", "trouble": "gw-gpu-1 ended early; exit code 3", "retry_in_s": 1740.0}
    status = {"state": "ready", "url": None, "parts": {}, "gateway": {"types": [healthy, ill]}}
    words = [str(part) for part in _status_parts(status) if isinstance(part, Text) and "trouble" in part]
    assert len(words) == 1
    assert all(said in words[0] for said in ("exit code 3", "29 min", "'gateway blocks retry gpu'"))
