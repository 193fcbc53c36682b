"""Several engines of one model: when another one starts, when one goes, and who comes first."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.catalog import Model
from serve.core import events as ev
from serve.core.effects import CreateAgent, DrainRoute, StartEngine, StopEngine
from serve.core.engine_use import surplus
from serve.core.spread import Spread, advance, engines_for
from serve.core.state import Engine, EngineState
from serve.core.step import DEFAULT
from serve.core.transaction import Transaction
from tests.support.fleets import Story, a_block, a_kind, a_model, a_policy, begin


def hot(rooms: int = 3, *others: Model, most: int = 3, policy: Any = None, **fields: Any) -> Story:
    """``a`` serves from one engine, on nodes with room for ``rooms`` models."""
    nodes = tuple(f"cpu-0-{number}" for number in range(rooms))
    model = a_model("a", replicas_max=most, target_in_flight=4, **fields)
    story = begin(model, *others, nodes=nodes, policy=policy or a_policy(a_kind(most=rooms)))
    story.ask("a")
    story.loaded("a")
    return story


def engines(story: Story, model: str = "a") -> list[Engine]:
    return [story.fleet.engines[engine] for engine in story.fleet.model_engines.get(model, ())]


def counted(story: Story, *in_flight: int, after: float = 1.0, queued: int = 0) -> None:
    """The edge's counters of the engines of ``a``, in the order of their start."""
    rows = zip(engines(story), in_flight, strict=False)
    seen = tuple(ev.ServerSeen(one.id, True, count, 0.0, queued) for one, count in rows if one.server is not None)
    story.on(ev.EdgeSeen(seen, story.now + after), after)


def busy(story: Story, *in_flight: int, seconds: int = 6) -> None:
    for _ in range(seconds):
        counted(story, *in_flight)


def two_serve(rooms: int = 2, *others: Model, **fields: Any) -> Story:
    story = hot(rooms, *others, **fields)
    busy(story, 8)
    story.loaded("a")
    counted(story, 4, 4)
    assert [engine.state for engine in engines(story)] == [EngineState.READY] * 2
    return story


def test_a_second_engine_starts_in_free_room_once_the_first_has_been_above_its_target_for_seconds() -> None:
    story = hot()
    busy(story, 5, seconds=5)
    assert len(story.ever(StartEngine)) == 1, "five seconds are not over"
    counted(story, 5)
    assert len(story.said(StartEngine)) == 1
    assert {engine.node for engine in engines(story)} == {"cpu-0-0", "cpu-0-1"}
    reasons = [one.because for one in story.fleet.decisions if one.model == "a"]
    assert "5 requests in flight and waiting, 4 for each engine: 2 engines are wanted" in reasons
    busy(story, 5)
    assert len(story.ever(StartEngine)) == 2, "two are enough for five requests"


def test_one_high_reading_starts_nothing() -> None:
    story = hot()
    for _ in range(10):
        counted(story, 40)
        counted(story, 3)
    assert len(story.ever(StartEngine)) == 1


def test_requests_that_queue_at_the_edge_count_and_replicas_max_is_the_limit() -> None:
    story = hot(rooms=4)
    for _ in range(8):
        counted(story, 4, queued=90)
    assert len(story.ever(StartEngine)) == 3


def test_who_waits_for_a_model_that_loads_counts_too() -> None:
    story = begin(a_model("a", replicas_max=2, target_in_flight=2), nodes=("cpu-0-0", "cpu-0-1"))
    for _ in range(5):
        story.ask("a")
    assert len(story.ever(StartEngine)) == 1
    story.tick(1.0)
    story.tick(5.0)
    assert len(story.ever(StartEngine)) == 2


def test_a_model_with_the_default_of_one_engine_never_has_a_second() -> None:
    story = begin(a_model("a"), nodes=("cpu-0-0", "cpu-0-1"))
    story.ask("a")
    story.loaded("a")
    busy(story, 5000, seconds=20)
    assert len(story.ever(StartEngine)) == 1


def test_a_second_engine_takes_no_room_of_another_model() -> None:
    story = hot(2, a_model("b"), a_model("c"))
    story.ask("b")
    story.loaded("b")
    story.seen("b", after=30)
    busy(story, 40, seconds=20)
    assert not story.ever(StopEngine)
    assert not story.ever(DrainRoute)


def test_no_second_engine_starts_while_a_model_without_one_waits_for_the_room() -> None:
    story = begin(a_model("a", replicas_max=2, target_in_flight=2), a_model("b"), policy=a_policy(a_kind(most=1)))
    for _ in range(5):
        story.ask("a")
    story.ask("b")
    story.tick(1.0)
    story.tick(6.0)
    assert story.fleet.spreads["a"].wanted == 2
    story.join("cpu-1-9", engines=(ev.FoundEngine("c-1-9", "c", (), 4096, 900.0, "", True, 10.0),))
    story.tick(1.0)
    assert len(story.ever(StartEngine)) == 1
    story.on(ev.EngineExited("c-1-9", "stopped", True))
    assert [start.model.name for start in story.said(StartEngine)] == ["b"], "although those for a wait longer"


def test_an_engine_goes_after_minutes_in_which_the_others_were_enough_with_a_reserve() -> None:
    story = two_serve()
    older, newer = engines(story)
    for _ in range(300):
        counted(story, 1, 1)
    assert not story.ever(DrainRoute), "the minutes are not over"
    busy(story, 1, 1, seconds=3)
    (drain,) = story.ever(DrainRoute)
    assert drain.engine == newer.id, "of equals the youngest"
    assert story.fleet.decisions[-1].engine == newer.id
    assert (
        story.fleet.decisions[-1].because == "2 requests in flight and waiting, 4 for each engine: 1 of them would do"
    )
    assert story.fleet.engines[older.id].state is EngineState.READY
    story.on(ev.RouteDrained(newer.id))
    counted(story, 1, 0)
    assert [stop.reason for stop in story.ever(StopEngine)] == ["surplus"]
    story.on(ev.EngineExited(newer.id, "stopped", True))
    busy(story, 0, seconds=700)
    assert len(story.ever(DrainRoute)) == 1, "never the last one"


def test_the_least_loaded_engine_drains() -> None:
    story = two_serve()
    older, _ = engines(story)
    for _ in range(304):
        counted(story, 0, 2)
    assert [drain.engine for drain in story.ever(DrainRoute)] == [older.id]


def test_a_peak_within_the_minutes_keeps_the_engine() -> None:
    story = two_serve()
    for _ in range(5):
        for _ in range(200):
            counted(story, 1, 1)
        counted(story, 2, 1)
    assert not story.ever(DrainRoute)


def test_a_drain_is_taken_back_when_the_load_returns() -> None:
    story = two_serve()
    for _ in range(304):
        counted(story, 1, 1)
    newer = engines(story)[1]
    assert newer.state is EngineState.DRAINING
    story.on(ev.RouteDrained(newer.id))
    busy(story, 9, 1, seconds=7)
    assert story.fleet.engines[newer.id].state is EngineState.READY
    assert len(story.ever(StartEngine)) == 2


def test_an_engine_to_be_spared_drains_within_seconds_when_another_model_has_none() -> None:
    story = two_serve(2, a_model("b"))
    counted(story, 1, 1)
    story.ask("b")
    busy(story, 1, 1, seconds=8)
    (drain,) = story.ever(DrainRoute)
    story.on(ev.RouteDrained(drain.engine))
    counted(story, 1, 0)
    story.on(ev.EngineExited(drain.engine, "stopped", True), 0.5)
    assert [start.model.name for start in story.ever(StartEngine)] == ["a", "a", "b"]
    assert len([one for one in engines(story) if one.state is EngineState.READY]) == 1


def test_busy_engines_are_not_spared_for_another_model() -> None:
    story = two_serve(2, a_model("b"))
    story.ask("b")
    busy(story, 4, 4, seconds=30)
    assert all(engine.stop_reason != "surplus" for engine in engines(story))


def test_what_is_surplus_is_known_before_it_drains() -> None:
    story = two_serve()
    busy(story, 1, 0, seconds=8)
    tx = Transaction(story.fleet, story.now, DEFAULT)
    older, newer = engines(story)
    assert (surplus(tx, older), surplus(tx, newer)) == (False, True)
    assert not story.ever(DrainRoute)


def test_a_replica_that_found_no_room_is_forgotten_within_seconds_of_the_load() -> None:
    story = hot(1)
    busy(story, 8, seconds=8)
    assert story.fleet.spreads["a"].wanted == 2
    busy(story, 1, seconds=8)
    story.join("cpu-1-9")
    busy(story, 1, seconds=8)
    assert len(story.ever(StartEngine)) == 1


def test_a_node_is_requested_for_a_replica_only_after_half_a_minute() -> None:
    story = hot(1, policy=a_policy(a_kind(most=2)))
    busy(story, 8, seconds=30)
    assert not story.ever(CreateAgent)
    busy(story, 8, seconds=10)
    assert len(story.ever(CreateAgent)) == 1
    busy(story, 8, seconds=60)
    assert len(story.ever(CreateAgent)) == 1, "the pending one is credited"


def test_a_node_goes_to_a_model_without_an_engine_before_a_replica() -> None:
    story = hot(1, a_model("b"), policy=a_policy(a_kind(most=2)))
    counted(story, 8)
    story.on(ev.LoadAsked("b"))
    busy(story, 8, seconds=60)
    (asked,) = story.ever(CreateAgent)
    story.join(asked.node)
    assert [start.model.name for start in story.ever(StartEngine)] == ["a", "b"]


def test_a_restarted_controller_keeps_all_engines() -> None:
    model = a_model("a", replicas_max=3, target_in_flight=4)
    story = begin(model, nodes=())
    found = [
        ev.FoundEngine(f"a-1-{number}", "a", (), 4096, 900.0 + number, f"10.0.0.1:{number}", True, 10.0)
        for number in range(2)
    ]
    servers = tuple(ev.FoundServer(0, n, one.address, True, False, 0, 5.0) for n, one in enumerate(found))
    story.on(ev.Started(2, {"a": 0}, servers, ("cpu-0-0", "cpu-0-1")), 1.0)
    for number, one in enumerate(found):
        story.join(f"cpu-0-{number}", engines=(one,))
    busy(story, 0, 0, seconds=100)
    assert len(engines(story)) == 2
    assert not story.ever(DrainRoute)
    busy(story, 0, 0, seconds=300)
    assert {drain.engine for drain in story.ever(DrainRoute)} == {"a-1-1"}


def test_two_engines_that_load_are_both_adopted_and_a_third_is_not() -> None:
    story = begin(a_model("a", 2, replicas_max=2), nodes=())
    found = tuple(ev.FoundEngine(f"a-1-{n}", "a", (), 2048, 900.0 + n, "", False) for n in range(3))
    story.on(ev.Started(2, {"a": 0}, (), ("cpu-0-0",)), 1.0)
    story.join(engines=found)
    states = [engine.state for engine in engines(story)]
    assert states == [EngineState.LOADING, EngineState.LOADING, EngineState.STOPPING]


def test_unload_stops_every_engine_and_forgets_the_load() -> None:
    story = two_serve()
    story.on(ev.UnloadAsked("a"))
    assert len(story.said(DrainRoute)) == 2
    for engine in engines(story):
        story.on(ev.RouteDrained(engine.id))
    counted(story, 0, 0)
    for engine in engines(story):
        story.on(ev.EngineExited(engine.id, "stopped", True))
    story.tick(10)
    assert len(story.ever(StartEngine)) == 2
    story.ask("a")
    story.tick(1)
    assert len(story.ever(StartEngine)) == 3, "one at first"


def test_a_lower_replicas_max_drains_engines_and_stops_none_that_fits() -> None:
    story = two_serve()
    story.on(ev.CatalogChanged((a_model("a", replicas_max=1, target_in_flight=4),)))
    assert len(story.said(DrainRoute)) == 1
    story.on(ev.EngineExited(story.said(DrainRoute)[0].engine, "stopped", True))
    assert "a" not in story.fleet.spreads


def test_of_two_engines_on_ending_nodes_each_is_replaced_before_it_drains() -> None:
    story = two_serve(4, most=2, policy=a_policy(a_kind(most=4), block_idle_s=1e6))
    old = engines(story)
    story.blocks(*(a_block(engine.node, ends=2000.0) for engine in old))
    counted(story, 4, 4, after=1640.0 - story.now)
    assert len(story.ever(StartEngine)) == 3, "at most one above replicas_max"
    story.loaded("a")
    (drain,) = story.ever(DrainRoute)
    assert len(story.ever(StartEngine)) == 4, "room for the second one's replacement"
    other = next(engine for engine in old if engine.id != drain.engine)
    assert story.fleet.engines[other.id].state is EngineState.READY, "its requests have no other place yet"
    story.loaded("a")
    assert {drain.engine for drain in story.ever(DrainRoute)} == {engine.id for engine in old}
    assert {engine.node for engine in engines(story)[2:]} == {"cpu-0-2", "cpu-0-3"}


# --- the arithmetic ---
@given(st.integers(0, 500), st.floats(0.5, 200), st.integers(1, 8))
def test_no_engine_has_more_than_its_target_unless_there_are_as_many_as_may_be(
    load: int, target: float, most: int
) -> None:
    count = engines_for(load, target, most)
    assert 1 <= count <= most
    assert count == most or load <= count * target
    assert count == 1 or load > (count - 1) * target


@given(st.lists(st.tuples(st.floats(0.1, 400), st.integers(0, 60), st.integers(0, 4)), max_size=60))
def test_the_number_of_engines_changes_only_to_what_was_called_for_all_the_time(
    readings: list[tuple[float, int, int]],
) -> None:
    spread, now = Spread(), 0.0
    past: list[tuple[float, int, int, int]] = []
    for after, load, have in readings:
        now += after
        rise, fall = engines_for(load, 4, 4), engines_for(load, 2, 4)
        past.append((now, rise, fall, have))
        before = spread
        spread = advance(spread, have, rise, fall, now, rise_s=5, fall_s=60)
        assert 1 <= spread.wanted <= 4
        if spread.wanted > before.wanted:
            recent = [one for one in past if one[0] >= now - 5]
            assert all(one[1] >= spread.wanted for one in recent)
            assert now - before.since >= 5
        elif spread.wanted < before.wanted and have >= before.wanted:
            recent = [one for one in past if one[0] >= now - 60]
            assert all(one[2] <= spread.wanted or one[3] < before.wanted for one in recent)
