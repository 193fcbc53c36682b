"""Stories of hand-over: what a node serves is loaded elsewhere before its block ends."""

from __future__ import annotations

from typing import Any

import pytest

from serve.core import events as ev
from serve.core.effects import CreateAgent, DrainRoute, KillAgent, OpenRoute, StartEngine, StopEngine
from serve.core.policy import REOPENS_S, NodeTypeSpec
from serve.core.state import EngineState, NodePhase, serving
from tests.support.fleets import Story, a_block, a_kind, a_model, a_policy, begin

OLD, NEW = "cpu-0-0", "cpu-1-2"
DRAIN_AT = 4170.0
"""Of a block that ends at 4500."""
LEAD = 20.0 + 30.0 + 10.0 + 10.0
"""Seen: 20 s in the queue and a load of 10 s; guessed: 30 s until the agent reports; and a margin of 10 s."""


def old(*others: str, most: int = 2, node_types: tuple[NodeTypeSpec, ...] = (), **fields: Any) -> Story:
    """Model a serves on a node whose block ends at 4500, and was used just now; ``others``: nodes that do not end."""
    policy = a_policy(*(node_types or (a_kind(most=most),)), block_idle_s=1e6, block_unused_s=None, **fields)
    story = begin(a_model("a"), a_model("b"), a_model("c", 2), policy=policy, nodes=(OLD, *others))
    story.blocks(a_block(OLD, ends=4500.0))
    story.ask("a")
    story.loaded("a")
    assert story.engine("a").node == OLD
    use(story)
    return story


def use(story: Story, model: str = "a", busy: int = 0) -> None:
    """A request came; ``busy``: so many go on."""
    story.seen(model, in_flight=1, after=0)
    story.seen(model, in_flight=busy, after=0)


def until(story: Story, when: float, used: str = "a") -> None:
    """Time passes, in the end second by second, and requests for the models in ``used`` (a letter each) come and go."""
    while story.now + 1 < when:
        story.tick(20 if story.now + 60 < when else 1)
        for model in used:
            use(story, model)
    story.tick(when - story.now)


def starts(story: Story, model: str) -> list[str]:
    """Nodes on which ``model`` was started."""
    return [start.node for start in story.ever(StartEngine) if start.model.name == model]


def old_engine(story: Story) -> Any:
    return next(engine for engine in story.fleet.engines.values() if engine.node == OLD)


def open_routes(story: Story, model: str = "a") -> int:
    return sum(map(serving, (story.fleet.engines[e] for e in story.fleet.model_engines.get(model, ()))))


def test_a_successor_is_asked_for_ahead_of_time_and_once() -> None:
    story = old()
    until(story, DRAIN_AT - LEAD - 0.1)
    assert not story.ever(CreateAgent)
    story.tick(0.2)
    assert story.said(CreateAgent) == (CreateAgent(NEW, "cpu"),)
    until(story, DRAIN_AT + 100)
    assert len(story.ever(CreateAgent)) == 1, "what is pending is credited"
    assert not story.ever(KillAgent), "nor given up when the old one leaves"


def test_the_old_engine_drains_when_the_new_one_serves() -> None:
    story = old()
    until(story, DRAIN_AT - 30)
    story.join(NEW)
    assert [start.node for start in story.said(StartEngine)] == [NEW]
    story.tick(5)
    assert not story.said(StopEngine), "nobody waits, and yet its load goes on"
    story.got_ready("a", after=5)
    assert story.said(OpenRoute)
    assert not story.ever(DrainRoute)
    assert open_routes(story) == 1
    story.opened("a")
    assert [drain.engine for drain in story.said(DrainRoute)] == [old_engine(story).id]
    assert open_routes(story) == 1
    assert story.fleet.nodes[OLD].phase is NodePhase.UP


def test_what_is_in_flight_on_a_handed_over_engine_has_until_its_node_leaves() -> None:
    story = old()
    use(story, busy=1)
    until(story, DRAIN_AT - 30, used="")
    story.join(NEW)
    story.got_ready("a")
    story.opened("a")
    story.on(ev.RouteDrained(old_engine(story).id))
    until(story, 4469.9, used="")
    assert not story.ever(StopEngine)
    until(story, 4470.0, used="")
    assert [stop.engine for stop in story.said(StopEngine)] == [old_engine(story).id]


def test_a_model_that_nobody_misses_is_not_handed_over() -> None:
    story = old()
    until(story, DRAIN_AT + 5, used="")
    assert not story.ever(CreateAgent)
    assert [drain.engine for drain in story.ever(DrainRoute)] == [old_engine(story).id]


@pytest.mark.parametrize("why", ["pinned", "in flight", "used lately"])
def test_what_matters(why: str) -> None:
    story = old()
    if why == "pinned":
        story.on(ev.PinChanged("a", True))
    elif why == "in flight":
        use(story, busy=1)
    until(story, DRAIN_AT - 500, used="")
    if why == "used lately":
        use(story)
    until(story, DRAIN_AT - LEAD + 1, used="")
    assert story.ever(CreateAgent)


def test_free_room_on_a_node_that_stays_is_taken_before_another_node_is_asked_for() -> None:
    story = old("cpu-0-1")
    until(story, DRAIN_AT - LEAD + 0.1)
    assert starts(story, "a") == [OLD, "cpu-0-1"]
    until(story, DRAIN_AT + 5)
    assert not story.ever(CreateAgent)


def test_a_node_that_ends_too_is_no_successor() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=3), block_idle_s=1e6), nodes=(OLD, "cpu-0-1"))
    story.blocks(a_block(OLD, ends=4500.0), a_block("cpu-0-1", ends=4500.0))
    story.ask("a")
    story.loaded("a")
    until(story, DRAIN_AT - LEAD + 1)
    assert starts(story, "a") == [OLD]
    assert story.ever(CreateAgent)


def test_a_successor_that_turns_out_to_end_too_is_succeeded_itself() -> None:
    story = old("cpu-0-1", "cpu-0-2", most=3)
    until(story, DRAIN_AT - LEAD + 1)
    assert starts(story, "a") == [OLD, "cpu-0-1"]
    story.blocks(a_block(OLD, ends=4500.0), a_block("cpu-0-1", ends=4500.0))
    story.tick(1)
    assert starts(story, "a") == [OLD, "cpu-0-1", "cpu-0-2"]
    assert not story.ever(StopEngine), "they do not hand over to each other"


def test_nothing_idle_is_evicted_for_a_hand_over_while_a_node_may_be_asked_for() -> None:
    story = old("cpu-0-1", most=3)
    story.ask("b")
    story.loaded("b")
    assert story.engine("b").node == "cpu-0-1"
    until(story, DRAIN_AT - LEAD + 1, used="ab")
    assert not story.ever(DrainRoute)
    assert story.ever(CreateAgent)


def test_never_more_than_max_nodes_and_no_request_fails() -> None:
    story = old(most=1)
    until(story, DRAIN_AT - 1)
    assert not story.ever(CreateAgent)
    assert open_routes(story) == 1
    until(story, DRAIN_AT)
    ticket = story.ask("a")
    story.drained("a")
    story.exited("a", "stopped", expected=True)
    story.tick(3)
    assert story.ever(CreateAgent) == (CreateAgent(NEW, "cpu"),)
    story.join(NEW)
    story.loaded("a")
    assert story.answers()[ticket].error is None


def test_the_smallest_kind_that_holds_it_is_asked_for() -> None:
    story = old(node_types=(a_kind("cpu", 4, most=2), a_kind("fat", 12, most=2)))
    until(story, DRAIN_AT - LEAD + 1)
    assert [ask.type for ask in story.ever(CreateAgent)] == ["cpu"]


def test_models_that_fit_together_share_a_successor() -> None:
    story = old()
    story.ask("c")
    story.loaded("c")
    assert story.engine("c").node == OLD
    until(story, DRAIN_AT - LEAD - 60, used="")
    use(story, "a")
    use(story, "c")
    until(story, DRAIN_AT + 50)
    assert len(story.ever(CreateAgent)) == 1
    story.join(story.ever(CreateAgent)[0].node)
    assert sorted(start.model.name for start in story.said(StartEngine)) == ["a", "c"]


def test_nothing_new_goes_to_a_node_that_ends_if_it_can_go_elsewhere() -> None:
    story = old("cpu-0-1")
    until(story, DRAIN_AT - LEAD + 1)
    story.ask("c")
    assert starts(story, "c") == ["cpu-0-1"], "though the tighter fit is on the old one"


def test_a_node_that_ends_takes_what_finds_no_other_place_and_has_useful_time_there() -> None:
    story = old(most=1, load_guess_s=20.0)
    until(story, DRAIN_AT - 45)
    story.ask("c")
    assert starts(story, "c") == [OLD]
    story = old(most=1, load_guess_s=20.0)
    until(story, DRAIN_AT - 39)
    story.ask("c")
    assert starts(story, "c") == []


def test_the_load_of_a_short_block_may_take_half_of_its_time() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=1), load_guess_s=60.0))
    story.blocks(a_block(OLD, starts=story.now - 20, ends=story.now + 100))
    story.ask("a")
    assert starts(story, "a") == [OLD], "useful until 1040; its load is thought to take 60 s"


def test_an_empty_node_that_ends_makes_way_for_one_that_does_not() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=1), load_guess_s=100.0, block_idle_s=1e6))
    story.blocks(a_block(OLD, ends=4500.0))
    until(story, DRAIN_AT - 90, used="")
    assert not story.ever(KillAgent)
    story.ask("a")
    assert story.ever(KillAgent) == (KillAgent(OLD),)
    story.tick(3)
    assert story.ever(CreateAgent)


def test_lead_is_never_more_than_half_of_a_nodes_time() -> None:
    story = old(queue_wait_guess_s=1e6, block_start_guess_s=1e6)
    half = (DRAIN_AT + 900.0) / 2
    until(story, half - 1)
    assert not story.ever(CreateAgent)
    until(story, half + 1)
    assert story.ever(CreateAgent)


def test_the_lead_follows_the_queue_and_the_start_of_blocks_lately() -> None:
    story = old()
    late = [a_block(f"cpu-8-{i}", 2000.0 + i, phase="completed", asked_at=1900.0 + i) for i in range(3)]
    story.blocks(a_block(OLD, ends=4500.0), *late)
    assert story.fleet.queue_wait_s == {"cpu": 100.0}
    until(story, DRAIN_AT - 150.1)
    assert not story.ever(CreateAgent)
    until(story, DRAIN_AT - 149.9)
    assert story.ever(CreateAgent)
    story.blocks(a_block(OLD, ends=4500.0), *late, a_block(NEW, story.now, 9000.0, asked_at=story.now - 10))
    story.join(NEW)
    assert story.fleet.block_start_s["cpu"] == ((NEW, 0.0),)


def test_a_ledger_that_is_behind_says_nothing_of_how_long_a_block_took_to_start() -> None:
    story = old()
    until(story, DRAIN_AT - LEAD + 1)
    behind = a_block(NEW, story.now + 600, phase="pending", asked_at=story.now - 10)
    story.blocks(a_block(OLD, ends=4500.0), behind)
    story.join(NEW)
    assert not story.fleet.block_start_s
    story.blocks(a_block(OLD, ends=4500.0), a_block(NEW, story.now - 12, 9000.0), after=2)
    assert story.fleet.block_start_s["cpu"] == ((NEW, 12.0),)


def test_the_new_engine_dies_and_the_old_one_is_taken_back() -> None:
    story = old("cpu-0-1")
    use(story, busy=1)
    until(story, DRAIN_AT - LEAD + 0.1, used="")
    story.loaded("a")
    previous = old_engine(story).id
    story.on(ev.RouteDrained(previous))
    story.exited("a")
    story.ask("a")
    story.tick(REOPENS_S)
    assert [opened.engine for opened in story.said(OpenRoute)] == [previous]
    story.on(ev.RouteOpened(previous))
    assert story.fleet.engines[previous].state is EngineState.READY


def test_a_successor_that_cannot_be_had_is_asked_for_again_after_a_back_off() -> None:
    story = old()
    until(story, DRAIN_AT - LEAD + 1)
    story.on(ev.NodeFailed(NEW, "no such partition"))
    assert not story.effects
    until(story, story.now + 2)
    assert len(story.ever(CreateAgent)) == 2


def test_what_was_unloaded_is_not_handed_over() -> None:
    story = old()
    use(story, busy=1)
    until(story, DRAIN_AT - LEAD + 1)
    story.join(NEW)
    story.on(ev.UnloadAsked("a"))
    story.tick(1)
    assert starts(story, "a") == [OLD, NEW]
    assert all(engine.stop_reason == "unloaded" for engine in story.fleet.engines.values())


def test_after_a_notice_what_matters_is_loaded_elsewhere_at_once() -> None:
    story = old("cpu-0-1")
    use(story, busy=1)
    story.on(ev.NodeLeaves(OLD, story.now + 20, "preempted"))
    assert [type(effect) for effect in story.effects] == [DrainRoute, StartEngine]
    assert starts(story, "a") == [OLD, "cpu-0-1"]
    story.on(ev.RouteDrained(old_engine(story).id))
    story.seen("a", after=0)
    story.on(ev.EngineExited(old_engine(story).id, "stopped", True))
    story.tick(5)
    assert story.engine("a").state is EngineState.LOADING, "its load goes on after the old one is gone"


def test_after_a_notice_a_node_is_asked_for() -> None:
    story = old()
    story.on(ev.NodeLeaves(OLD, story.now + 20, "preempted"))
    assert story.said(CreateAgent) == (CreateAgent(NEW, "cpu"),)
    story.tick(1)
    assert not story.said(CreateAgent)


def test_when_it_was_used_goes_with_a_model_so_that_one_unused_is_not_handed_on_for_ever() -> None:
    story = old("cpu-0-1", "cpu-0-2", most=3)
    until(story, DRAIN_AT - LEAD + 1)
    story.loaded("a")
    assert story.engine("a").node == "cpu-0-1"
    used = story.engine("a").last_used
    assert used > DRAIN_AT - LEAD - 1
    story.tick(599 - (story.now - used))
    story.on(ev.NodeLeaves("cpu-0-1", story.now + 2000, "preempted"))
    assert starts(story, "a")[-1] == "cpu-0-2"
    story.loaded("a")
    story.tick(60)
    story.on(ev.NodeLeaves("cpu-0-2", story.now + 2000, "preempted"))
    assert len(starts(story, "a")) == 3


def test_in_a_queue_of_generations_each_node_is_succeeded_once() -> None:
    """Blocks of two minutes, three at a time at most, for half an hour under load."""
    story = begin(a_model("a"), policy=a_policy(a_kind(most=3)), nodes=())
    blocks: dict[str, ev.SeenBlock] = {}
    waiting: dict[str, float] = {}
    story.ask("a")
    while story.now < 2800.0:
        for ask in story.effects:
            if isinstance(ask, CreateAgent):
                waiting[ask.node] = story.now
        for node, asked in list(waiting.items()):
            if story.now >= asked + 10:
                del waiting[node]
                blocks[node] = a_block(node, story.now - 5, story.now + 115, asked_at=asked)
                story.blocks(*blocks.values())
                story.join(node)
        for engine in list(story.fleet.engines.values()):
            if engine.state is EngineState.LOADING and story.now >= engine.started + 5:
                story.on(ev.EngineReady(engine.id, engine.id, 5.0))
                story.on(ev.RouteOpened(engine.id))
            elif engine.state is EngineState.DRAINING:
                story.on(ev.RouteDrained(engine.id))
                story.on(ev.EdgeSeen((ev.ServerSeen(engine.id, True, 0, story.now),), story.now))
            elif engine.state is EngineState.STOPPING:
                story.on(ev.EngineExited(engine.id, "stopped", True))
                story.on(ev.RouteClosed(engine.id))
            else:
                story.on(ev.EdgeSeen((ev.ServerSeen(engine.id, True, 1, story.now),), story.now))
        story.tick(1)
        assert story.now < 1030 or open_routes(story), f"nothing serves at {story.now}"
        assert len(story.fleet.nodes) <= 3
    asked = len(story.ever(CreateAgent))
    assert 1800 / 60 - 2 <= asked <= 1800 / 30, "each serves between half and all of its useful minute"
