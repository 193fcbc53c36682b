"""``gateway models why`` and ``gateway controller replay``: what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway_plugin.cli.main import cli
from serve.controller.journal import Journal
from serve.core.replay import digest, new_decisions
from serve.core.step import initial, step
from tests.support.answering import answering
from tests.unit.controller.test_journal import random_run
from tests.unit.core.test_properties import POLICY

WHY = {
    "model": "Qwen/Qwen3-8B", "state": "queued", "why": ["It waits for room.", "1 request waits for it."],
    "would_change": ["Node n1 could hold it but for b (pinned)."],
    "decisions": [
        {"ago_s": 61.0, "action": "evict", "model": "Qwen/Qwen3-8B", "engine": "e1", "other": "b", "because": "b waits"}
    ],
    "later": 1,
}  # fmt: skip


def gateway(state: Path, *arguments: str) -> Result:
    runner = CliRunner(env={"GATEWAY_URL": "", "GATEWAY_API_KEY": ""})
    return runner.invoke(cli, ["--state", str(state), *arguments], catch_exceptions=False)


def test_why_is_told_in_sentences(tmp_path: Path) -> None:
    answers: dict[str, Any] = {"GET /gateway/v1/models/why?model=Qwen%2FQwen3-8B": [WHY]}
    with answering(tmp_path, **answers):
        said = gateway(tmp_path, "models", "why", "Qwen/Qwen3-8B")
        document = json.loads(gateway(tmp_path, "models", "why", "Qwen/Qwen3-8B", "--json").stdout)
    assert said.stdout.splitlines() == [
        "Qwen/Qwen3-8B is queued.",
        "It waits for room.",
        "1 request waits for it.",
        "",
        "What would change it:",
        "  Node n1 could hold it but for b (pinned).",
        "",
        "Last decisions:",
        "  61 s ago: evict Qwen/Qwen3-8B (e1) for b: b waits",
    ]
    assert document == {key: value for key, value in WHY.items() if key != "later"}


def recorded(folder: Path, seed: int = 7) -> list[Path]:
    """The log of a random run, in two files."""
    events = random_run(seed, 300)
    fleet = initial(POLICY)
    kept = Journal(folder)
    for number, (event, at) in enumerate(events):
        kept = Journal(folder) if number == len(events) // 2 else kept
        before = fleet
        fleet, effects = step(before, event, at)
        kept.record(event, at, before, digest(effects, new_decisions(before, fleet)))
    return [folder / "events.1.jsonl", folder / "events.jsonl"]


def test_a_replay_prints_decisions_over_both_files_and_stops_where_it_differs(tmp_path: Path) -> None:
    logs = recorded(tmp_path)
    count = sum(len(log.read_text().splitlines()) for log in logs) - len(logs)
    done = gateway(tmp_path, "controller", "replay", *map(str, logs), "--json")
    assert done.exit_code == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count
    decided = [made for row in rows for made in row["decisions"]]
    assert len({made["action"] for made in decided}) > 1
    words = gateway(tmp_path, "controller", "replay", *map(str, logs)).stdout
    assert words.count("    decided: ") == len(decided)
    lines = logs[1].read_text().splitlines()
    wrong = next(index for index, line in enumerate(lines) if '"did"' in line)
    changed = {**json.loads(lines[wrong]), "did": "0" * 12}
    logs[1].write_text("\n".join([*lines[:wrong], json.dumps(changed), *lines[wrong + 1 :]]) + "\n")
    done = gateway(tmp_path, "controller", "replay", str(logs[1]))
    assert done.exit_code == 2
    assert f"event {wrong} (" in done.stderr
    assert "does otherwise than the controller that recorded it" in done.stderr


@pytest.mark.process
def test_another_process_replays_a_log_to_the_same_effects_and_decisions(tmp_path: Path) -> None:
    """No order of a set or of hashes is in them."""
    logs = recorded(tmp_path, seed=3)
    command = [sys.executable, "-m", "gateway_plugin.cli.main", "controller", "replay", *map(str, logs)]
    for seed in ("1", "2"):
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "    decided: " in done.stdout
