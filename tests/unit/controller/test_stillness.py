"""Which engines have requests in flight at the edge and send nothing."""

from __future__ import annotations

from dataclasses import replace

from serve.controller.stillness import STILL_S, Flow, flows, still
from tests.unit.controller.test_observer import ENGINE, FLEET, SERVER

BUSY = replace(SERVER, bytes_out=100)
KNOWN = {"e1": Flow(100, 1000.0)}


def test_bytes_and_an_empty_engine_are_progress() -> None:
    assert flows({}, FLEET, [BUSY], 1000.0) == KNOWN
    assert flows(KNOWN, FLEET, [BUSY], 1005.0) == KNOWN
    assert flows(KNOWN, FLEET, [replace(BUSY, bytes_out=101)], 1005.0) == {"e1": Flow(101, 1005.0)}
    assert flows(KNOWN, FLEET, [replace(BUSY, in_flight=0)], 1005.0) == {}


def test_requests_that_come_and_clients_that_leave_are_none() -> None:
    assert flows(KNOWN, FLEET, [replace(BUSY, in_flight=9, total=12)], 1005.0) == KNOWN
    assert flows(KNOWN, FLEET, [replace(BUSY, in_flight=1)], 1005.0) == KNOWN


def test_a_server_that_is_another_engines_says_nothing_of_this_one() -> None:
    assert flows(KNOWN, FLEET, [replace(BUSY, address="127.0.0.1:10")], 1005.0) == {}


def test_its_agent_is_told_after_a_while_what_is_in_flight() -> None:
    fleet = replace(FLEET, engines={"e1": replace(ENGINE, in_flight=4)})
    assert still(fleet, KNOWN, 1000.0 + STILL_S - 0.1) == {}
    assert still(fleet, KNOWN, 1000.0 + STILL_S) == {"n": {"e1": 4}}
    assert still(replace(FLEET, engines={}), KNOWN, 1005.0) == {}
