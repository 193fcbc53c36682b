"""More models than slots at the edge, while engines drain and sleep."""

from __future__ import annotations

from serve.core import events as ev
from serve.core.effects import StopEngine
from serve.core.state import EngineState
from tests.support.fleets import GIB, a_kind, a_model, a_policy, begin
from tests.unit.core.test_sleep import NODE, asleep


def test_a_slot_is_freed_while_an_engine_drains_for_long() -> None:
    """``b`` drains for ``a``, with a request in flight: that frees no slot, as it falls asleep then. ``c`` sleeps."""
    models = [a_model(name, 8, gpus=1) for name in "abcd"]
    policy = a_policy(a_kind("gpu", 4, gpus=(10,), most=1), slots=3, sleep_once_loaded=False)
    story = begin(*models, policy=policy, nodes=(NODE,), host_gib=4, gpus=(10,), sleep_mib=80 * GIB)
    before = ""
    for name in "cab":
        story.ask(name, after=5)
        if before:
            asleep(story, before)
            story.on(ev.RouteClosed(story.engine(before).id))
        story.loaded(name, can_sleep=True)
        story.used(name)
        before = name
    story.ask("a", after=5)
    story.on(ev.RouteDrained(story.engine("b").id))
    story.seen("b", in_flight=1)
    assert story.engine("b").state is EngineState.DRAINING
    story.ask("d")
    for _ in range(60):
        story.seen("b", in_flight=1, after=1)
    assert {stop.engine: stop.reason for stop in story.ever(StopEngine)} == {story.engine("c").id: "slot-needed"}
