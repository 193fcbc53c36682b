"""Requests that no engine takes yet: their order at the edge, and what the controller hears of them."""

from __future__ import annotations

import pytest

from serve.core import events as ev
from serve.simulate.clock import Clock
from serve.simulate.edge import EDGE_S, Edge
from serve.simulate.metrics import Outcome
from serve.simulate.parts import Engine, Pending
from serve.simulate.service import Service
from serve.simulate.times import Times
from serve.simulate.traces import Request

ONE_BY_ONE = Times(1, 70, cold_s=30, wake_s=1, prompt_tokens_per_s=1e9, token_s=1.0, beside=1e9, concurrency=1)


class Door:
    """An edge before engines of one model that take one request at a time."""

    def __init__(self, engines: int = 1) -> None:
        self.clock = Clock()
        self.engines = {
            f"e{index}": Engine(
                f"e{index}", "A", "n0", (index,), 1, ONE_BY_ONE, Service(1e9), lambda one: None, "ready"
            )
            for index in range(engines)
        }
        self.pending: dict[int, Pending] = {}
        self.told: list[ev.Event] = []
        self.began: list[str] = []
        self.away: list[int] = []
        self.edge = Edge(
            self.clock, self.engines, self.pending, tell=self.told.append,
            begins=lambda one: self.began.append(one.request.user), ends=self._ends, turned_away=self.away.append,
        )  # fmt: skip
        for engine in self.engines:
            self.edge.open(engine)
        self.until(1.0)

    def _ends(self, number: int, outcome: Outcome) -> None:
        del self.pending[number]

    def ask(self, user: str, seconds: int = 1) -> bool:
        number = max(self.pending, default=0) + 1
        self.pending[number] = Pending(Request(self.clock.now, "A", 0, seconds, user), self.clock.now)
        return self.edge.take(number)

    def until(self, end: float) -> None:
        self.clock.at(end, lambda: None)
        while self.clock.now < end:
            self.clock.advance()


def test_who_has_less_under_way_goes_first() -> None:
    door = Door()
    for _ in range(5):
        assert door.ask("greedy")
    assert door.ask("modest")
    door.until(10.0)

    assert door.began == ["greedy", "modest", "greedy", "greedy", "greedy", "greedy"]


def test_a_request_that_waits_is_not_passed_for_ever() -> None:
    door = Door()
    for _ in range(4):
        door.ask("greedy")  # the first is served, the last stands back for 3 s
    for number in range(20):  # as many as are served
        door.ask(f"modest{number}")
        door.until(door.clock.now + 1)

    assert door.began.count("greedy") == 4
    assert "greedy" not in door.began[15:]


def test_of_two_that_keep_an_engine_busy_who_asks_for_more_gets_no_more() -> None:
    door = Door()
    most = {"many": 20, "few": 5}
    for second in range(1000):
        for user, count in most.items():
            while sum(one.request.user == user for one in door.pending.values()) < count:
                door.ask(user)
        door.until(2.0 + second)

    served = door.began[200:]
    assert 0.5 <= served.count("few") / len(served) < 0.7


def test_what_was_served_cut_or_turned_away_no_longer_counts_for_its_user() -> None:
    door = Door()
    for _ in range(4):
        door.ask("greedy")
    door.until(3.5)  # two were served
    door.edge.cut(door.engines["e0"])  # one in flight, one waits

    assert door.away == [4]
    assert not +door.edge._at_model


def test_what_waits_is_counted_and_shared_among_the_routes() -> None:
    door = Door(engines=2)
    for _ in range(5):
        door.ask("u", seconds=60)
    door.edge.read_in(0.0)
    door.until(1.5)

    seen = next(event for event in reversed(door.told) if isinstance(event, ev.EdgeSeen))
    assert [(one.engine, one.in_flight, one.queued) for one in seen.servers] == [("e0", 1, 2), ("e1", 1, 1)]


def test_another_route_serves_what_waits_and_without_any_it_is_turned_away() -> None:
    door = Door(engines=2)
    for _ in range(4):
        door.ask("u", seconds=10)
    door.edge.drain("e0")
    assert door.away == []
    door.edge.drain("e1")
    assert door.away == [3, 4]
    assert not door.ask("u")
    door.until(1.0 + 2 * EDGE_S)
    assert ev.RouteDrained("e1") in door.told


def test_a_request_goes_to_no_engine_that_is_not_ready() -> None:
    door = Door()
    door.engines["e0"].state = "asleep"

    with pytest.raises(AssertionError, match="e0: a request is sent to it while it is asleep"):
        door.ask("u")
    with pytest.raises(AssertionError, match="e0: its route is to be opened while it is asleep"):
        door.edge.open("e0")
