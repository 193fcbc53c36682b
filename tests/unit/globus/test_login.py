"""Somebody logs in to Globus on the terminal of ``gateway endpoint``: the command, a pty, a stand-in for the SDK."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.globus.endpoint.store import EndpointRecord, Records
from gateway_plugin.processes import mark
from tests.support.globus import fake_sdk
from tests.support.terminal import Terminal

pytestmark = pytest.mark.process


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder with an endpoint that runs (a process that sleeps), nobody logged in."""
    venv = fake_sdk.make(tmp_path)
    (tmp_path / "state/endpoints/globus/gateway").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        record = EndpointRecord(
            id="i", venv=venv, functions=("f",), answers=str(tmp_path / "a"),
            process=mark(process.pid), host=socket.gethostname(),
        )  # fmt: skip
        Records(tmp_path / "state/endpoints").write("gateway", record)
        yield tmp_path / "state"
        process.kill()


def command(state: Path) -> list[str]:
    return [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(state), "endpoint", "start"]


@pytest.fixture
def terminal(state: Path) -> Iterator[Terminal]:
    made = Terminal(command(state), fake_sdk.environment(state.parent))
    yield made
    made.close()


def test_a_person_logs_in_and_nothing_is_drawn_meanwhile(terminal: Terminal, state: Path) -> None:
    terminal.read_until(fake_sdk.PROMPT)
    assert "https://auth.example.org/" in terminal.shown
    assert terminal.quiet_for(0.4), "the progress display writes over what somebody types"
    terminal.type("right\n")
    terminal.read_until("'gateway' is online: i")
    assert terminal.end() == 0, terminal.shown
    assert (state / "endpoints/globus/token").read_text() == "right"


def test_a_wrong_code_is_an_error_of_one_line(terminal: Terminal) -> None:
    terminal.read_until(fake_sdk.PROMPT)
    terminal.type("wrong\n")
    terminal.read_until("login failed (ValueError: wrong is not a code)")
    assert terminal.end() != 0
    assert "Traceback" not in terminal.shown


def test_ctrl_c_at_the_prompt_ends_the_command(terminal: Terminal) -> None:
    terminal.read_until(fake_sdk.PROMPT)
    terminal.type("\x03")
    assert terminal.end() != 0
    assert "Traceback" not in terminal.shown


def test_without_a_terminal_it_says_which_variables_to_set(state: Path) -> None:
    ended = subprocess.run(
        command(state),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        env=fake_sdk.environment(state.parent),
        start_new_session=True,
    )
    assert ended.returncode != 0
    assert "GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET" in ended.stderr
    assert "Traceback" not in ended.stderr
