"""One load at a time on a GPU, and no stop while it lasts."""

from __future__ import annotations

from serve.core import events as ev
from serve.core.effects import Answer, CreateAgent, StartEngine, StopEngine
from serve.core.forecast import eta_s, waiting_reason
from serve.core.state import EngineState
from serve.core.views.status import model_view
from tests.support.fleets import Story, a_kind, a_model, a_policy, begin

ONE_GPU = a_policy(a_kind("gpu", host_gib=100, gpus=(80,), most=3))


def on_one_gpu(*sizes: int) -> Story:
    """Models ``a``, ``b``, ... of these GiB on a node with one GPU of 80 GiB."""
    models = (a_model(name, size, gpus=1) for name, size in zip("abcd", sizes, strict=False))
    return begin(*models, policy=ONE_GPU, nodes=("gpu-0-0",), host_gib=100, gpus=(80,))


def started(story: Story) -> list[str]:
    return [effect.model.name for effect in story.ever(StartEngine)]


def test_two_asked_at_once_load_one_after_the_other() -> None:
    story = on_one_gpu(20, 20)
    story.ask("a")
    story.ask("b")
    assert started(story) == ["a"]
    assert waiting_reason(story.fleet, "b", story.now) == "waits until 'a' has loaded on the same GPU"
    assert model_view(story.fleet, "b", story.now)["state"] == "queued"
    assert eta_s(story.fleet, "b", story.now) == 120.0, "a load of either"
    story.loaded("a")
    assert started(story) == ["a", "b"]
    story.loaded("b")
    assert len(story.ever(Answer)) == 2
    assert not story.ever(StopEngine)


def test_a_waiter_that_gives_up_hears_what_it_waited_for() -> None:
    story = on_one_gpu(20, 20)
    story.ask("a")
    ticket = story.ask("b", wait_s=5.0)
    story.tick(6)
    error = story.answers()[ticket].error
    assert error is not None
    assert "waits until 'a' has loaded on the same GPU" in error.message


def test_no_node_is_asked_for_because_of_a_load_beside() -> None:
    story = on_one_gpu(20, 20)
    story.ask("a")
    story.ask("b")
    story.tick(60)
    assert not story.ever(CreateAgent)


def test_an_engine_is_stopped_when_the_load_beside_it_is_over() -> None:
    story = on_one_gpu(30, 20, 50)
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.tick(60)
    story.ask("b")
    story.ask("c", after=1)
    story.drained("a")
    assert story.engine("a").state is EngineState.DRAINING
    assert not story.ever(StopEngine)
    assert waiting_reason(story.fleet, "c", story.now) == "waits until 'b' has loaded on the same GPU"
    story.got_ready("b")
    assert [stop.engine for stop in story.said(StopEngine)] == [story.engine("a").id]
    assert started(story) == ["a", "b"]
    assert waiting_reason(story.fleet, "c", story.now) is None, "room is being freed"
    story.exited("a", expected=True)
    assert started(story) == ["a", "b", "c"]


def test_an_engine_that_waits_to_be_stopped_is_not_made_to_wait_for_further_loads() -> None:
    story = on_one_gpu(20, 20, 20, 10)
    story.ask("a")
    story.loaded("a")
    story.ask("b")
    story.on(ev.UnloadAsked("a"))
    story.drained("a")
    story.ask("c")
    story.got_ready("b")
    assert [stop.engine for stop in story.said(StopEngine)] == [story.engine("a").id]
    assert started(story) == ["a", "b"], "there is room for c, but a stops"
    assert waiting_reason(story.fleet, "c", story.now) == "waits until 'a' has ended on the same GPU"
    story.exited("a", expected=True)
    assert started(story) == ["a", "b", "c"]


def test_a_load_that_never_ends_keeps_others_waiting_for_its_timeout_at_most() -> None:
    models = a_model("a", 20, gpus=1, load_timeout=30), a_model("b", 20, gpus=1)
    story = begin(*models, policy=ONE_GPU, nodes=("gpu-0-0",), host_gib=100, gpus=(80,))
    story.ask("a")
    story.ask("b")
    story.tick(30)
    assert [stop.engine for stop in story.said(StopEngine)] == [story.engine("a").id]
    story.exited("a", expected=True)
    assert started(story)[:2] == ["a", "b"]


def test_one_for_two_gpus_is_not_overtaken_for_ever_by_those_for_one() -> None:
    models = [a_model("wide", 20, gpus=2), *(a_model(name, 5, gpus=1) for name in "abcdef")]
    kind = a_kind("gpu", host_gib=100, gpus=(80, 80))
    story = begin(*models, policy=a_policy(kind), nodes=("gpu-0-0",), host_gib=100, gpus=(80, 80))
    story.ask("a")
    story.ask("b", after=1)
    assert {effect.gpus for effect in story.ever(StartEngine)} == {(0,), (1,)}, "side by side on two GPUs"
    story.ask("wide", after=1)
    for name in "cdef":
        story.ask(name, after=1)
    story.tick(200)
    story.loaded("a")
    assert started(story) == ["a", "b"], "its GPU is kept for the one that has waited longest"
    story.loaded("b")
    assert started(story) == ["a", "b", "wide"]


def test_without_a_gpu_engines_load_side_by_side() -> None:
    story = begin(a_model("a", 2), a_model("b", 2))
    story.ask("a")
    story.ask("b")
    assert started(story) == ["a", "b"]
