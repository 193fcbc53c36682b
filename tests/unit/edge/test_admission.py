"""What the edge's tables say of keys in flight; the answers are HAProxy 2.8's."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_plugin.edge.admission import admit_only, held_by, sessions
from gateway_plugin.errors import EdgeError

A, B = "A" * 64, "B" * 64
HELD = f"""\
# table: held, type: string, size:10240, used:3
0x4d46dc8: key={A}/8 use=1 exp=4697 shard=0 conn_cur=1
0x4d47138: key={A}/19 use=1 exp=4702 shard=0 conn_cur=1
0x4d47ff8: key={B}/9 use=1 exp=4702 shard=0 conn_cur=1

"""
EMPTY = "# table: held, type: string, size:10240, used:0\n\n"
SESSION = """\
0x4db6150: [26/Nov/2026:04:03:31.431144] id={number} proto=tcpv4 source=127.0.0.1:4
  flags=0x8, conn_retries=0, conn_exp=<NEVER> conn_et=0x000 srv_conn=(nil), pend_pos=(nil) waiting=0 epoch=0
  frontend=front (id=2 mode=http), listener=? (id=1) addr=127.0.0.1:8180
"""


def test_requests_are_found_by_their_keys_digest() -> None:
    assert held_by({A}, HELD) == {8, 19}
    assert held_by({A, B}, HELD) == {8, 9, 19}
    assert held_by({"C" * 64}, HELD) == frozenset()
    assert held_by({A}, EMPTY) == frozenset()


def test_an_edge_without_the_table_is_no_edge_without_requests() -> None:
    for answer in ("No such table\n", "", "Unknown command: 'show'"):
        with pytest.raises(EdgeError, match="cannot say what is in flight"):
            held_by({A}, answer)


def test_sessions_by_number() -> None:
    assert sessions(SESSION.format(number=8)) == {8: "0x4db6150"}
    assert sessions("Session not found\n") == {}


def test_a_session_that_ended_meanwhile_does_not_cost_another_its_life() -> None:
    """The pointer that the list gave belongs to another request by now."""
    said: list[str] = []
    held = iter([HELD, EMPTY])

    def edge(command: str) -> str:
        said.append(command)
        if command.startswith("show map"):
            return f"0x1 {B} user:ann\n"
        if command.startswith("show table"):
            return next(held)
        return SESSION.format(number=8 if command == "show sess all" else 77)

    admit_only(edge, Path("/k/keys.map"), {B: "user:ann"}, {A}, 5.0)
    assert not any(command.startswith("shutdown") for command in said)
    assert "show sess 0x4db6150" in said


def test_what_does_not_end_is_said() -> None:
    def edge(command: str) -> str:
        return HELD if command.startswith("show table") else ""

    with pytest.raises(EdgeError, match="2 requests that were to be cut are still in flight"):
        admit_only(edge, Path("/k/keys.map"), {}, {A}, 0.05)


def test_without_a_change_the_requests_in_flight_are_not_looked_at() -> None:
    said: list[str] = []

    def edge(command: str) -> str:
        said.append(command)
        return f"0x1 {A} user:ann\n"

    admit_only(edge, Path("/k/keys.map"), {A: "user:ann"}, (), 5.0)
    assert said == ["show map /k/keys.map"]
