"""``gateway endpoint``: what it refuses before anything is made, and says what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway_plugin.cli.main import cli


def run(state: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--state", str(state), "endpoint", *words])


@pytest.mark.parametrize("command", ["start", "stop", "restart", "status", "delete"])
def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path, command: str) -> None:
    ended = run(tmp_path, command, "nowhere")
    assert ended.exit_code == 66
    assert "'nowhere'" in ended.output
    assert "gateway endpoint configure" in ended.output


def test_errors_are_json_where_a_program_reads(tmp_path: Path) -> None:
    ended = run(tmp_path, "status", "nowhere", "--json")
    assert json.loads(ended.stdout)["error"]["code"] == "not_found"


def test_multi_user_and_mapping_go_together(tmp_path: Path) -> None:
    ended = run(tmp_path, "configure", "--url", "https://127.0.0.1:1", "--multi-user")
    assert ended.exit_code == 2
    assert "--identity-mapping" in ended.output


def test_who_may_configure_what(tmp_path: Path) -> None:
    mapping = tmp_path / "map.json"
    mapping.write_text("[]")
    multi = ["--multi-user", "--identity-mapping", str(mapping), "--contact", "ops@example.org"]
    if os.getuid() == 0:
        ended, words = run(tmp_path, "configure", "--url", "https://127.0.0.1:1"), "ordinary user"
        assert "--shared-folder" in run(tmp_path, "configure", "--url", "https://127.0.0.1:1", *multi).output
    else:
        ended, words = run(tmp_path, "configure", "--url", "https://127.0.0.1:1", *multi), "root"
    assert ended.exit_code == 2
    assert words in ended.output
    assert not (tmp_path / "endpoints").exists(), "nothing was made"


def test_no_endpoints_are_an_empty_list(tmp_path: Path) -> None:
    assert json.loads(run(tmp_path, "list", "--json").stdout) == []
