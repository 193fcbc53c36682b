"""Where a model loads, by who sleeps there: an engine wakes on its own GPUs, and not while something loads there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.core.beside import ACROSS, TURN_S, blocked_s
from serve.core.crowds import crowd
from serve.core.effects import DrainRoute, StartEngine, WakeEngine
from serve.core.events import UnloadAsked
from serve.core.habits import Habit, busy
from serve.core.plan import Plan
from serve.core.policies.pressure import sleep_worth
from serve.core.room import Able, Need, Room, victims
from serve.core.state import Engine, EngineState
from serve.core.step import DEFAULT
from serve.core.transaction import Transaction
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin
from tests.unit.core.test_sleep import NODE, asleep, one_gpu, serving


def gpus(*numbers: int) -> tuple[int, ...]:
    return numbers


def test_each_that_sleeps_on_any_of_the_gpus_waits() -> None:
    others = [(gpus(0, 1), 8.0), (gpus(1), 3.0), (gpus(2), 1.0)]
    assert blocked_s(gpus(0), others) == 8.0
    assert blocked_s(gpus(1, 2), others) == 12.0


@pytest.mark.parametrize(
    ("need", "others", "taken"),
    [
        (Need(1, 10), [(gpus(0), 5.0), (gpus(1), 2.0)], gpus(2)),
        (Need(1, 10), [(gpus(0), 5.0), (gpus(1), 2.0), (gpus(2, 3), 9.0)], gpus(1)),
        (Need(2, 10), [(gpus(0, 3), 4.0), (gpus(1, 2), 4.1)], gpus(0, 3)),
        (Need(2, 10), [(gpus(0, 1), 4.0), (gpus(2, 3), 4.0), (gpus(0), 1.0)], gpus(2, 3)),
        (Need(2, 10), [(gpus(0), 1.0), (gpus(1, 2, 3), 2.0)], gpus(1, 2)),
    ],
    ids=["none", "least", "all of one's", "all of one's that is alone", "some of one's"],
)
def test_devices_are_taken_where_it_costs_least(
    need: Need, others: list[tuple[tuple[int, ...], float]], taken: tuple[int, ...]
) -> None:
    room = Room(0, (20, 30, 40, 50))
    assert room.devices(need, others=others) == taken


def test_those_go_beside_whom_nobody_sleeps_that_would_wait() -> None:
    story = serving(one_gpu(), "a")
    engine: Engine = story.engine("a")
    held = {gpu: [(2.0 + gpu, replace(engine, id=f"e{gpu}"), 8)] for gpu in (0, 1)}
    able = Able([], held, {}, (2.0, engine))
    room, need = Room(0, (0, 0)), Need(1, 8)
    alone = victims(able, room, need, summed=True)
    assert alone is not None
    assert (alone.gpus, alone.cost) == ((0,), 2.0)
    beside = victims(able, room, need, summed=True, others=[(gpus(0), 4.0)])
    assert beside is not None
    assert (beside.gpus, beside.cost) == ((1,), 3.0)
    both = victims(able, room, need, summed=True, others=[(gpus(0, 1), 4.0)])
    assert both is not None
    assert (both.gpus, both.cost, both.beside_s) == ((0,), 2.0, 4.0), "what it is worth is not what they wait"


def two_gpus(*models: str, sizes: tuple[int, int] = (10, 12), gib: float = 8) -> Story:
    """``first`` sleeps on the first GPU, which fits tighter."""
    policy = a_policy(a_kind("gpu", 4, gpus=sizes, most=1), sleep_once_loaded=False)
    story = begin(
        *(a_model(name, gib, gpus=1, keep_alive=30) for name in models), policy=policy, nodes=(NODE,), host_gib=4,
        gpus=sizes, sleep_mib=40 * GIB,
    )  # fmt: skip
    serving(story, "first")
    story.tick(31)
    asleep(story, "first")
    return story


def gpus_of(story: Story, model: str) -> tuple[int, ...]:
    return story.engine(model).parts[0].gpus


@pytest.mark.parametrize(("asked_often", "gpu"), [(True, 1), (False, 0)])
def test_a_load_goes_where_nobody_sleeps_that_may_be_asked(asked_often: bool, gpu: int) -> None:
    story = two_gpus("first", "second", gib=4)
    habit = Habit(story.now, 0.5, 0.5) if asked_often else Habit(0.0)
    story.fleet = replace(story.fleet, habits={"first": habit})
    story.ask("second", after=1)
    assert gpus_of(story, "second") == (gpu,)


@pytest.mark.parametrize(("drain_s", "after_s", "goes"), [(0.0, 20, True), (30.0, 20, False), (600.0, 120, True)])
def test_the_quantum_of_one_that_sleeps_is_measured_in_its_drains_too(drain_s: float, after_s: int, goes: bool) -> None:
    """It wakes within a second, and what is in flight took so long to end when it last went; for a minute at most."""
    story = serving(one_gpu(a_model("a", 8, gpus=1), a_model("b", 8, gpus=1)), "a")
    story.fleet = replace(
        story.fleet, load_s={"a": 10.0, "b": 10.0}, wake_s={"a": 1.0, "b": 1.0}, drain_s={"a": drain_s}
    )
    story.seen("a", in_flight=1, after=9)
    for _ in range(60):
        story.ask("b")
    for _ in range(after_s):
        story.seen("a", in_flight=1, after=1)
    assert bool(story.ever(DrainRoute)) is goes


ASKING = 20
"""Requests of a model that weigh what its move costs within seconds."""


def crowded(here: float, there: float) -> Story:
    """``first`` is asked while ``busy`` serves on the GPU where it sleeps, and ``calm`` is idle on the other one; the
    shares of the last ten minutes in which these were used."""
    story = two_gpus("first", "busy", "calm", sizes=(10, 10))
    story.fleet = replace(story.fleet, habits={})
    for model in ("calm", "busy"):
        story.ask(model)
        story.loaded(model, can_sleep=True)
        story.used(model)
    assert [gpus_of(story, model) for model in ("first", "busy", "calm")] == [(0,), (0,), (1,)]
    shares = {"first": 0.1, "busy": here, "calm": there}
    story.fleet = replace(
        story.fleet,
        habits={model: Habit(story.now, 0.0, share) for model, share in shares.items()},
        drain_s={"busy": 10.0},
    )
    story.seen("busy", in_flight=4, after=6)
    for _ in range(ASKING):
        story.ask("first")
    for _ in range(4):
        story.seen("busy", in_flight=4, after=1)
    return story


def test_a_model_moves_from_where_another_one_is_always_in_use() -> None:
    story = crowded(0.9, 0.1)
    asleep(story, "calm")
    before = len(story.ever(StartEngine))
    story.seen("busy", in_flight=4, after=1)
    assert [start.gpus for start in story.ever(StartEngine)][before - 1 :] == [(1,)]
    assert not story.ever(WakeEngine)
    story.loaded("first", can_sleep=True)
    assert story.answers()[f"t{story.tickets}"].error is None
    assert [story.engine(model).state for model in ("busy", "first")] == [EngineState.READY] * 2


@pytest.mark.parametrize(("here", "there"), [(0.5, 0.0), (0.9, 0.6)])
def test_it_stays_where_it_would_gain_little(here: float, there: float) -> None:
    story = crowded(here, there)
    assert story.engine("calm").state is EngineState.READY
    assert len(story.ever(StartEngine)) == 3


def fall_asleep(story: Story) -> None:
    """The new engine of ``first``, unused for its keep-alive."""
    story.tick(31)
    asleep(story, "first")
    assert [one.state for one in story.fleet.engines.values() if one.model == "first"] == [EngineState.ASLEEP] * 2


def moved() -> Story:
    """``first`` slept where ``busy`` serves, and serves where ``calm`` sleeps now."""
    story = crowded(0.9, 0.1)
    asleep(story, "calm")
    story.loaded("first", can_sleep=True)
    story.used("first")
    assert [(gpus_of(story, model), story.engine(model).state) for model in ("busy", "first")] == [
        ((0,), EngineState.READY), ((1,), EngineState.READY)
    ]  # fmt: skip
    return story


def worth(story: Story) -> list[bool]:
    """Of the old and the new engine of ``first``: whether its host memory is kept for it."""
    tx = Transaction(story.fleet, story.now, DEFAULT)
    return [sleep_worth(tx, engine) > 0 for engine in tx.engines_of("first")]


def test_of_a_model_that_moved_the_old_engine_goes_first_even_if_both_sleep() -> None:
    """Else it would be back where it was crowded out, and load again to move again."""
    story = moved()
    story.fleet = replace(story.fleet, load_s={"first": 45.0}, wake_s={"first": 1.0})
    assert worth(story) == [False, True], "the new one serves"
    fall_asleep(story)
    assert worth(story) == [False, True]


def test_what_drains_before_its_sleep_is_worth_more_than_the_old_engine_of_its_model() -> None:
    """There may be host memory for one only, and it is decided then which one it is."""
    story = moved()
    story.fleet = replace(story.fleet, load_s={"first": 45.0}, wake_s={"first": 1.0})
    story.tick(31)
    assert story.engine("first").state is EngineState.DRAINING
    assert worth(story) == [False, True]


def test_of_two_that_sleep_the_one_wakes_that_can_at_once() -> None:
    story = moved()
    fall_asleep(story)
    story.seen("busy", in_flight=4)
    story.on(UnloadAsked("busy"))
    assert story.engine("busy").state is EngineState.DRAINING, "there will be room for the old one"
    story.ask("first", after=1)
    assert [wake.engine for wake in story.said(WakeEngine)] == [story.engine("first").id]


def test_a_gpu_is_not_used_by_one_that_sleeps_there_while_its_model_serves_elsewhere() -> None:
    story = moved()
    tx = Transaction(story.fleet, story.now, DEFAULT)
    shares = {model: busy(habit, story.now) for model, habit in story.fleet.habits.items()}
    used = [crowd(tx, tx.nodes.rows[NODE], gpus(gpu), Need(1, 8 * GIB), "other") for gpu in (0, 1)]
    assert used == pytest.approx([shares["busy"], shares["calm"] + shares["first"]])


def shared(there: tuple[int, ...], *, sleeps: bool = True) -> Story:
    """A node of two GPUs; on the second one as many engines of other models sleep as ``there`` says, each with so many
    GPUs. All of the memory of a GPU is needed by any."""
    policy = a_policy(a_kind("gpu", 4, gpus=(10, 10), most=1), sleep_once_loaded=False)
    models = [a_model(f"m{index}", 8, gpus=count, keep_alive=30, sleep=sleeps) for index, count in enumerate(there)]
    story = begin(
        *models, a_model("new", 8, gpus=1, keep_alive=30), policy=policy, nodes=(NODE,), host_gib=4, gpus=(10, 10),
        sleep_mib=100 * GIB,
    )  # fmt: skip
    return story


def others_of(story: Story) -> dict[tuple[int, ...], float]:
    tx = Transaction(story.fleet, story.now, DEFAULT)
    return dict(Plan(tx).others(tx.nodes.rows[NODE], "new"))


@pytest.mark.parametrize(("count", "weight"), [(1, 1), (2, ACROSS)])
def test_a_load_counts_the_turns_with_those_that_do_not_fit_beside_it(count: int, weight: int) -> None:
    """Also with one that is in use now: it will sleep there."""
    story = serving(shared((count,)), "m0")
    mine = gpus_of(story, "m0")
    assert others_of(story) == {mine: TURN_S * weight}
    story.tick(31)
    asleep(story, "m0")
    story.fleet = replace(story.fleet, habits={})
    assert others_of(story) == {mine: TURN_S * weight}


def test_one_that_is_stopped_when_it_goes_takes_no_turns() -> None:
    assert others_of(serving(shared((1,), sleeps=False), "m0")) == {}


def test_those_that_fit_on_one_gpu_take_no_turns() -> None:
    story = begin(
        a_model("small", 4, gpus=1), a_model("new", 4, gpus=1), policy=a_policy(a_kind("gpu", 4, gpus=(10,), most=1)),
        nodes=(NODE,), host_gib=4, gpus=(10,), sleep_mib=100 * GIB,
    )  # fmt: skip
    assert others_of(serving(story, "small")) == {}


@pytest.mark.parametrize(("count", "moves"), [(2, True), (1, False)])
def test_a_model_moves_to_where_its_turns_weigh_less(count: int, moves: bool) -> None:
    """``first`` sleeps where ``other`` serves, on one GPU or on two; ``calm`` is idle on one of its own."""
    story = begin(
        a_model("first", 8, gpus=1, keep_alive=30), a_model("calm", 8, gpus=1, keep_alive=600),
        a_model("other", 8, gpus=count, keep_alive=600), nodes=(NODE,), host_gib=4, gpus=(10, 12, 14)[: count + 1],
        policy=a_policy(a_kind("gpu", 4, gpus=(10, 12, 14)[: count + 1], most=1), sleep_once_loaded=False),
        sleep_mib=100 * GIB,
    )  # fmt: skip
    serving(story, "first")
    story.tick(31)
    asleep(story, "first")
    story.fleet = replace(story.fleet, habits={})
    serving(story, "calm")
    serving(story, "other")
    home, calm = gpus_of(story, "first"), gpus_of(story, "calm")
    assert set(home) < set(gpus_of(story, "other")) or home == gpus_of(story, "other")
    habits = {model: Habit(story.now, 0.0, 0.1) for model in ("first", "calm", "other")}
    story.fleet = replace(story.fleet, habits=habits, drain_s={"other": 10.0})
    story.seen("other", in_flight=4, after=6)
    for _ in range(ASKING):
        story.ask("first")
    for _ in range(4):
        story.seen("other", in_flight=4, after=1)
    going = {drain.engine for drain in story.ever(DrainRoute)}
    assert (story.engine("calm").id in going) is moves
    if moves:
        asleep(story, "calm")
        story.tick(1)
        assert [start.gpus for start in story.ever(StartEngine)][-1] == calm
