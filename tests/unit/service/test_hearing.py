"""Reports of nodes among calls of others."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gateway_plugin.doctor.node_report import REPORT_BYTES, Report
from gateway_plugin.service.hearing import Heard, listening, report_in
from tests.support.agents import eventually

HOST = "127.0.0.1"


def report(nonce: str) -> bytes:
    made = Report(
        nonce=nonce, host="n1", time_s=1.0, python="3.11.7", packages={}, folder="seen", head="reached", address=HOST,
        port=1, cpus=1, memory_mib=1, visible_gpus="", gpu_mib=[], isolation="works",
    )  # fmt: skip
    return made.model_dump_json().encode() + b"\n"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def heard(port: int) -> Iterator[Heard]:
    with listening(HOST, port) as found:
        found.expected |= {"ours", "other"}
        yield found


def call(port: int, said: bytes = b"") -> socket.socket:
    line = socket.create_connection((HOST, port), timeout=5)
    line.sendall(said)
    return line


def test_who_says_nothing_keeps_nobody_out(heard: Heard, port: int) -> None:
    """Also when there are more of them than are listened to at a time."""
    with ExitStack() as lines:
        for _ in range(400):
            lines.enter_context(call(port))
        begun = time.monotonic()
        slow = lines.enter_context(call(port, report("ours")[:40]))
        lines.enter_context(call(port, report("other")))
        assert eventually(lambda: "other" in heard.reports)
        slow.sendall(report("ours")[40:])
        assert eventually(lambda: "ours" in heard.reports)
        assert time.monotonic() - begun < 3


def test_only_what_was_asked_for_is_kept_and_only_once(heard: Heard, port: int) -> None:
    for said in (report("strangers"), b"{}\n", b"\xff\n", report("ours")):
        call(port, said).close()
    assert eventually(lambda: "ours" in heard.reports)
    call(port, report("ours").replace(b"n1", b"n2")).close()
    call(port, report("other")).close()
    assert eventually(lambda: "other" in heard.reports)
    assert eventually(lambda: set(heard.reports) == set(heard.times) == {"ours", "other"})
    assert heard.reports["ours"].host == "n1"


def test_a_report_without_end_is_cut(heard: Heard, port: int) -> None:
    with call(port) as line, pytest.raises((ConnectionResetError, BrokenPipeError)):
        for _ in range(64 * 2**20 // REPORT_BYTES):  # more than sockets hold
            line.sendall(b"x" * REPORT_BYTES)
    assert heard.reports == {}


def test_a_port_that_is_taken_is_not_listened_to(port: int) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen(1)
        with listening(HOST, port) as found:
            assert not found.talk


def test_a_report_of_another_job_is_none() -> None:
    found = report_in(report("ours"), {"ours"})
    assert found is not None
    assert found.nonce == "ours"
    assert report_in(report("ours"), {"other"}) is None
