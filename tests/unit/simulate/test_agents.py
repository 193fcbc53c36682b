"""Starts, sleeps, wakes and stops in the simulated world: their times, their memory, and what is ruled out."""

from __future__ import annotations

import pytest

from serve.core import effects as ef
from serve.core import events as ev
from serve.simulate.agents import Agents
from serve.simulate.clock import Clock
from serve.simulate.metrics import Tally
from serve.simulate.parts import Engine, Fleet
from serve.simulate.times import Times, catalog

TIMES = Times(
    1, 40, cold_s=30, wake_s=2, prompt_tokens_per_s=1, token_s=1, weights_gib=20, sleep_s=0.5, stop_s=1, kept_gib=1
)  # fmt: skip
TWO = Times(2, 40, cold_s=30, wake_s=2, prompt_tokens_per_s=1, token_s=1, weights_gib=20, sleep_s=0.5, stop_s=1)
LARGE = Times(1, 75, cold_s=30, wake_s=2, prompt_tokens_per_s=1, token_s=1)
MODELS = {"A": TIMES, "B": TIMES, "C": TIMES, "wide": TWO}


class Node:
    """One node of two GPUs, and what its agent reported."""

    def __init__(self, host_gib: float = 64, pin_gib_per_s: float = 1.0) -> None:
        self.clock, self.tally, self.told = Clock(), Tally(), list[ev.Event]()
        fleet = Fleet(2, 2, 76, host_gib, pin_gib_per_s)
        self.agents = Agents(self.clock, fleet, self.tally, self.told.append, keep_spans=True)

    def last(self) -> ev.Event:
        return self.told[-1]

    def start(self, model: str, gpus: tuple[int, ...] = (0,), sleep_mib: int = 0) -> Engine:
        entry = next(one for one in catalog(MODELS) if one.name == model)
        self.agents.start(ef.StartEngine(f"{model}-1", "n0", entry, gpus, 0, 1, sleep_mib), MODELS[model])
        return self.agents.engines[f"{model}-1"]

    def started(self, model: str, gpus: tuple[int, ...] = (0,)) -> Engine:
        engine = self.start(model, gpus)
        self.settle()
        return engine

    def asleep(self, model: str, gpus: tuple[int, ...] = (0,)) -> Engine:
        engine = self.started(model, gpus)
        self.agents.sleep(engine)
        self.settle()
        return engine

    def settle(self) -> float:
        """Until nothing is planned; returns the time that it took."""
        began = self.clock.now
        while self.clock.advance():
            pass
        return self.clock.now - began


def test_the_first_sleep_takes_host_memory_at_its_speed_and_later_ones_do_not() -> None:
    node = Node(pin_gib_per_s=2.0)
    engine = node.started("A")
    assert node.last() == ev.EngineReady("A-1", "A-1:1", 30, can_sleep=True)

    node.agents.sleep(engine)
    assert node.settle() == pytest.approx(20 / 2 + 0.5)
    assert node.last() == ev.EngineAsleep("A-1", 20 * 1024, 10.5, kept_mib=1024)
    node.clock.after(5, lambda: node.agents.wake(engine))
    assert node.settle() == pytest.approx(5 + 2)
    assert node.last() == ev.EngineAwake("A-1", 2)
    node.agents.sleep(engine)
    assert node.settle() == pytest.approx(0.5)
    assert node.last() == ev.EngineAsleep("A-1", 20 * 1024, 0.5, kept_mib=1024)

    assert node.tally.device_s_lost == pytest.approx(30 + 10.5 + 2 + 0.5)
    states = [span.state for span in node.tally.spans]
    assert states == ["loading", "falling-asleep", "asleep", "waking", "falling-asleep"]


def test_the_gpus_of_several_take_their_host_memory_side_by_side() -> None:
    node = Node()
    engine = node.started("wide", (0, 1))
    node.agents.sleep(engine)

    assert node.settle() == pytest.approx(20 / 2 + 0.5)
    assert node.tally.device_s_lost == pytest.approx(2 * (30 + 10.5))


def test_a_sleeper_leaves_its_gpu_to_others_and_wakes_when_they_are_gone() -> None:
    node = Node()
    first = node.asleep("A")
    second = node.asleep("B")
    assert node.tally.switches == 1
    node.agents.wake(first)
    node.settle()

    assert node.tally.switches == 2
    assert [first.state, second.state] == ["ready", "asleep"]
    with pytest.raises(AssertionError, match=r"B-1: the memory of n0's GPU 0 is over-committed"):
        node.agents.wake(second)


def test_a_wake_on_what_only_itself_left_is_no_switch() -> None:
    node = Node()
    node.agents.wake(node.asleep("A"))

    assert node.tally.switches == 0


def test_host_memory_is_held_until_the_engine_is_gone() -> None:
    node = Node(host_gib=40)
    first = node.asleep("A")
    node.agents.wake(first)
    node.settle()
    node.agents.sleep(node.started("B", (1,)))
    node.settle()
    third = node.started("C", (1,))
    node.agents.stop(first)
    node.settle()
    node.agents.sleep(third)  # 40 GiB again
    node.settle()

    with pytest.raises(AssertionError, match=r"A-1: 20480 MiB too much sleeps on n0"):
        node.agents.sleep(node.started("A"))


def test_an_engine_that_is_stopped_asleep_gives_no_gpu_memory_back_twice() -> None:
    node = Node()
    engine = node.asleep("A")
    node.started("B")
    node.agents.stop(engine)
    node.settle()
    assert node.last() == ev.EngineExited("A-1", "stopped", expected=True)

    with pytest.raises(AssertionError, match="over-committed"):
        node.start("C")


def test_an_engine_that_sleeps_once_before_it_is_ready_takes_longer_and_sleeps_quickly_later() -> None:
    node = Node(host_gib=60)
    engine = node.start("A", sleep_mib=40 * 1024)  # what it may take

    with pytest.raises(AssertionError, match="20480 MiB too much sleeps"):
        node.start("B", (1,), sleep_mib=40 * 1024)
    node.settle()
    ready = next(event for event in node.told if isinstance(event, ev.EngineReady))
    assert ready == ev.EngineReady("A-1", "A-1:1", 30 + 20 + 0.5 + 2, can_sleep=True, sleep_mib=20 * 1024)
    node.agents.sleep(engine)
    assert node.settle() == pytest.approx(0.5)


def test_a_sleeper_keeps_some_of_its_gpu_until_it_is_gone() -> None:
    node = Node()
    node.asleep("A")  # keeps 1 of 76 GiB
    node.asleep("B")
    entry = next(one for one in catalog({"large": LARGE}))
    large = ef.StartEngine("large-1", "n0", entry, (0,), 0, 1)
    with pytest.raises(AssertionError, match="over-committed"):
        node.agents.start(large, LARGE)

    node = Node()
    sleeper = node.asleep("A")
    node.agents.stop(sleeper)
    node.settle()
    node.agents.start(large, LARGE)


@pytest.mark.parametrize("move", ["loads", "falls asleep", "wakes", "stops"])
def test_nothing_moves_on_a_gpu_while_another_engine_does(move: str) -> None:
    node = Node()
    sleeper = node.asleep("B")
    if move == "loads":
        node.start("A")
    elif move == "falls asleep":
        node.agents.sleep(node.started("A"))
    elif move == "wakes":
        node.agents.wake(node.asleep("A"))
    else:
        node.agents.stop(node.started("A"))

    with pytest.raises(AssertionError, match="moves on"):
        node.agents.wake(sleeper)


def test_memory_is_given_back_while_another_process_stops() -> None:
    node = Node()
    first = node.asleep("A")
    second = node.started("B")
    node.agents.stop(first)
    node.agents.sleep(second)
    node.settle()

    assert list(node.agents.engines) == ["B-1"]
    assert second.state == "asleep"


def test_only_a_quiet_engine_without_a_route_falls_asleep() -> None:
    node = Node()
    engine = node.started("A")
    engine.open = True
    with pytest.raises(AssertionError, match="open route"):
        node.agents.sleep(engine)
    engine.open = False
    engine.service.begin(1, 5.0, node.clock.now)
    with pytest.raises(AssertionError, match="1 requests in flight"):
        node.agents.sleep(engine)


def test_where_nothing_may_sleep_the_engines_cannot() -> None:
    node = Node(host_gib=0)
    node.started("A")

    assert node.last() == ev.EngineReady("A-1", "A-1:1", 30, can_sleep=False)
