"""A model whose engine sleeps, while others hold its GPUs: wait for these, load elsewhere, or ask for a node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.core import events as ev
from serve.core.effects import CreateAgent, DrainRoute, OpenRoute, StartEngine, WakeEngine
from serve.core.state import Action
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin
from tests.unit.core.test_sleep import NODE, asleep


def under_a_busy_one(most_nodes: int, hot_load_s: float = 10.0, min_residency: float = 0.0) -> Story:
    """``cold`` sleeps on the first GPU; ``hot`` is never idle there, and does not sleep. ``other`` is pinned on the
    second GPU, if there is one."""
    models = a_model("cold", 8, gpus=1), a_model("hot", 8, gpus=1, sleep=False, min_residency=min_residency)
    policy = a_policy(a_kind("gpu", 4, gpus=(10,), most=most_nodes), sleep_once_loaded=False)
    nodes = (NODE,) if most_nodes == 1 else (NODE, "gpu-0-1")
    story = begin(
        *models, a_model("other", 8, gpus=1), policy=policy, nodes=nodes, host_gib=4, gpus=(10,), sleep_mib=40 * GIB
    )  # fmt: skip
    story.ask("cold")
    story.loaded("cold", can_sleep=True, after=45.0)
    story.used("cold")
    if most_nodes > 1:
        story.on(ev.PinChanged("other", True))
        story.loaded("other")
    story.ask("hot", after=5)
    asleep(story, "cold")
    story.loaded("hot", after=hot_load_s)
    story.used("hot")
    story.seen("hot", in_flight=4)
    return story


def second_gpu_is_free(story: Story, model: str = "other") -> None:
    story.on(ev.UnloadAsked(model))
    story.drained(model)
    story.exited(model, expected=True)


def starts(story: Story) -> list[str]:
    return [start.model.name for start in story.ever(StartEngine)]


def test_a_node_is_asked_for_soon_and_taken() -> None:
    story = under_a_busy_one(4, hot_load_s=100.0)
    story.ask("cold")
    for _ in range(4):
        story.seen("hot", in_flight=4, after=1)
    (asked,) = story.ever(CreateAgent)
    story.join(asked.node, host_gib=4, gpus=(10,), sleep_mib=40 * GIB)
    for _ in range(90):
        if len(starts(story)) > 3:
            break
        story.seen("hot", in_flight=4, after=1)
    assert starts(story) == ["cold", "other", "hot", "cold"], "free room there is not left empty"
    assert len(story.ever(CreateAgent)) == 1


@pytest.mark.parametrize(("hot_load_s", "after_s"), [(10.0, 90), (100.0, 0)])
def test_it_is_loaded_into_free_room(hot_load_s: float, after_s: int) -> None:
    """At once where ``hot`` stays for longer than a load takes; after half of the bound where it drains for so long."""
    story = under_a_busy_one(4, hot_load_s)
    second_gpu_is_free(story)
    story.ask("cold")
    for _ in range(after_s):
        assert starts(story) == ["cold", "other", "hot"]
        story.seen("hot", in_flight=4, after=1)
    assert starts(story) == ["cold", "other", "hot", "cold"]
    assert not story.ever(CreateAgent)


def test_it_does_not_wait_for_one_that_must_stay() -> None:
    story = under_a_busy_one(2, min_residency=3600.0)
    story.used("other")
    story.on(ev.PinChanged("other", False))
    story.tick(5)
    story.ask("cold")
    story.tick(1)
    assert [(one.model, one.other) for one in story.fleet.decisions if one.action is Action.EVICT][-1] == (
        "other", "cold"
    )  # fmt: skip


def test_a_route_opens_again_only_when_the_one_before_its_sleep_is_closed() -> None:
    """Both commands would be under way for one engine, and the outcome of one be taken for the other's."""
    story = begin(
        a_model("a", 8, gpus=1), a_model("b", 8, gpus=1), policy=a_policy(a_kind("gpu", 4, gpus=(10,), most=1)),
        nodes=(NODE,), host_gib=4, gpus=(10,), sleep_mib=40 * GIB,
    )  # fmt: skip
    story.ask("a")
    story.loaded("a", can_sleep=True)
    story.used("a")
    story.ask("b", after=5)
    asleep(story, "a")  # the edge has not closed its route yet
    story.on(ev.WaiterLeft("t2"))
    story.on(ev.EngineExited(story.engine("b").id, "stopped", True))
    story.ask("a")
    engine = story.engine("a").id
    assert story.ever(WakeEngine)
    story.on(ev.EngineAwake(engine, 0.5), 0.5)
    assert not story.said(OpenRoute)
    story.on(ev.RouteClosed(engine))
    assert [one.engine for one in story.said(OpenRoute)] == [engine]


@pytest.mark.parametrize(("drain_s", "loads"), [(20.0, 0), (90.0, 1)])
def test_one_that_will_sleep_after_its_drain_is_waited_for_unless_a_load_elsewhere_is_sooner(
    drain_s: float, loads: int
) -> None:
    """``big`` was first, and gets its room; on the third GPU is free room for it."""
    small = [a_model(name, 4, gpus=1) for name in ("a", "c")]
    policy = a_policy(a_kind("gpu", 4, gpus=(10, 10, 5), most=1), sleep_once_loaded=False)
    story = begin(
        *small, a_model("big", 8, gpus=2), policy=policy, nodes=(NODE,), host_gib=4, gpus=(10, 10, 5),
        sleep_mib=40 * GIB,
    )  # fmt: skip
    for model in ("c", "a"):
        story.ask(model)
        story.loaded(model, can_sleep=True, after=45.0)
        story.used(model)
    second_gpu_is_free(story, "c")
    story.fleet = replace(story.fleet, drain_s={"a": drain_s})
    story.ask("big", after=60)
    assert [one.engine for one in story.said(DrainRoute)] == [story.engine("a").id]
    before = len(story.ever(StartEngine))
    story.ask("a", after=0.1)
    assert len(story.ever(StartEngine)) - before == loads
