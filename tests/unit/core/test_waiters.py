"""Stories of waiters: what each is told, and when."""

from __future__ import annotations

import itertools

import pytest

from gateway_plugin.errors import (
    DeadlineTooEarly,
    GatewayError,
    GoingDown,
    ModelNotFound,
    ModelQueueFull,
    ModelUnavailable,
    NoRoom,
    Unloaded,
    WaitDeadline,
)
from serve.core import events as ev
from serve.core.effects import (
    Answer,
    CloseRoute,
    CreateAgent,
    DrainRoute,
    KillAgent,
    StartEngine,
    StopEngine,
    SyncSlots,
)
from serve.core.forecast import model_state
from serve.core.state import EngineState
from serve.core.step import initial
from serve.core.views.status import models_view, status_view
from tests.support.fleets import Story, a_block, a_kind, a_model, a_policy, begin


def told(story: Story, ticket: str) -> GatewayError:
    """The error that ``ticket`` was answered with."""
    error = story.answers()[ticket].error
    assert error is not None
    return error


def fail(story: Story, model: str, times: int) -> None:
    """Its load fails; time passes until the next try begins."""
    for _ in range(times):
        while not story.fleet.model_engines.get(model):
            story.tick(1)
        story.exited(model, "exit code 1: out of memory")


def test_an_unknown_model_is_said_to_be_unknown() -> None:
    story = begin(a_model("a"))
    error = told(story, story.ask("zzz"))
    assert isinstance(error, ModelNotFound)
    assert "a" in error.message


def test_an_alias_waits_for_its_model() -> None:
    story = begin(a_model("a", aliases=("gpt-4",)))
    ticket = story.ask("gpt-4")
    story.loaded("a")
    assert story.answers()[ticket].error is None


def test_a_model_larger_than_any_node_is_refused_at_once() -> None:
    story = begin(a_model("huge", 100), a_model("gpu", 1, gpus=1))
    assert isinstance(told(story, story.ask("huge")), NoRoom)
    assert isinstance(told(story, story.ask("gpu")), NoRoom)
    assert not story.fleet.waiters


def test_the_queue_is_bounded() -> None:
    story = begin(a_model("a"), policy=a_policy(waiting_max=2))
    tickets = [story.ask("a") for _ in range(3)]
    error = told(story, tickets[2])
    assert isinstance(error, ModelQueueFull)
    assert "Retry-After" in error.headers()
    assert set(story.fleet.waiters) == set(tickets[:2])


def test_the_deadline_says_state_and_expectation() -> None:
    story = begin(a_model("a"))
    ticket = story.ask("a", wait_s=30)
    story.tick(29)
    assert not story.effects
    story.tick(1)
    error = told(story, ticket)
    assert isinstance(error, WaitDeadline)
    assert (error.state, error.eta_s) == ("loading", 30.0)


def test_a_load_that_nobody_wants_any_more_is_finished_and_kept_for_who_comes_back() -> None:
    story = begin(a_model("a", keep_alive=0))
    ticket = story.ask("a")
    story.on(ev.WaiterLeft(ticket), 1)
    story.tick(60)
    story.loaded("a")
    story.tick(100)
    ticket = story.ask("a")
    assert story.answers()[ticket].error is None
    assert len(story.ever(StartEngine)) == 1
    story.used("a")
    story.tick(5)
    assert story.ever(DrainRoute), "its keep_alive is over"


def test_a_model_that_nobody_comes_back_for_is_not_kept_for_ever() -> None:
    story = begin(a_model("a", keep_alive=0))
    story.on(ev.WaiterLeft(story.ask("a")), 1)
    story.loaded("a")
    story.tick(story.fleet.policy.unclaimed_s - 1)
    assert not story.ever(DrainRoute)
    story.tick(2)
    assert story.ever(DrainRoute)


def test_a_load_that_nobody_wants_any_more_makes_room_after_a_grace() -> None:
    story = begin(a_model("a"), a_model("b"))
    story.on(ev.WaiterLeft(story.ask("a")), 1)
    story.ask("b", after=1)
    assert not story.ever(StopEngine), "its client may be back in a moment"
    story.tick(1)
    assert [stop.engine for stop in story.said(StopEngine)] == ["a-1-1"]
    story.exited("a", "stopped", expected=True)
    assert story.ever(StartEngine)[-1].model.name == "b"
    assert not story.fleet.failures


def test_loads_that_no_client_waits_for_come_after_those_that_one_does() -> None:
    """30 requests with ``x-gateway-wait: 0``, and one of another user: it waits for none of their loads."""
    story = begin(*(a_model(f"m{number}") for number in range(30)), a_model("wanted"))
    for number in range(30):
        story.ask(f"m{number}", wait_s=120, unattended=True)
    assert len(story.ever(StartEngine)) == 1
    ticket = story.ask("wanted", after=0.5)
    for _ in range(10):
        story.tick(0.25)
    assert [stop.engine for stop in story.ever(StopEngine)] == ["m0-1-1"]
    story.exited("m0", "stopped", expected=True)
    story.tick()
    assert [start.model.name for start in story.ever(StartEngine)] == ["m0", "wanted"]
    story.loaded("wanted")
    assert story.answers()[ticket].error is None


def test_loads_that_no_client_waits_for_do_not_stop_each_other_but_make_use_of_idle_room() -> None:
    story = begin(a_model("a"), a_model("b"), a_model("c"))
    story.ask("a")
    story.loaded("a")
    story.used("a")
    story.ask("b", after=30, unattended=True)
    story.ask("c", unattended=True)
    story.drained("a")
    story.exited("a", "stopped", expected=True)
    assert story.ever(StartEngine)[-1].model.name == "b"
    for _ in range(20):
        story.tick(1)
    story.loaded("b")
    story.tick(60)
    assert len(story.ever(StartEngine)) == 2, "b waits for who asked for it"
    assert len(story.ever(StopEngine)) == 1


def test_loads_that_no_client_waits_for_ask_for_one_block_at_a_time() -> None:
    story = begin(*(a_model(f"m{n}", 6) for n in range(8)), policy=a_policy(a_kind(most=8)), nodes=())
    for number in range(8):
        story.ask(f"m{number}", wait_s=120, unattended=True)
    story.tick(10)
    assert len(story.ever(CreateAgent)) == 1
    story.ask("m7")
    story.tick(10)
    story.ask("m6")
    story.tick(10)
    assert len(story.ever(CreateAgent)) == 2, "one is there for the first who waits, one more for the second"


def test_of_those_who_do_not_wait_one_at_a_time_keeps_its_place_in_the_queue_for_a_block() -> None:
    story = begin(*(a_model(f"m{n}", 6) for n in range(8)), policy=a_policy(a_kind(most=8)), nodes=())
    story.ask("m0", wait_s=60)
    story.blocks(a_block("cpu-1-1", story.now + 100, phase="pending", asked_at=story.now))
    for number in range(1, 8):
        story.ask(f"m{number}", wait_s=0)
        story.tick(1)
    assert len(story.answers()) == 7
    assert list(story.fleet.requested_until) == ["m1"]
    assert len(story.ever(CreateAgent)) == 2


def test_two_models_whose_clients_give_up_too_early_do_not_stop_each_others_loads_for_ever() -> None:
    """Each takes 60 s to load; each client waits for 40 s, and asks again 5 s later."""
    story = begin(a_model("a"), a_model("b"))
    waits: dict[str, tuple[str, float]] = {}
    asks = {"a": story.now, "b": story.now + 20}
    end = story.now + 600
    while asks and story.now < end:
        for model in sorted(asks):
            ticket, since = waits.get(model, ("", 0.0))
            if ticket in story.answers():
                del asks[model]
            elif ticket and story.now >= since + 40:
                story.on(ev.WaiterLeft(waits.pop(model)[0]))
                asks[model] = story.now + 5
            elif not ticket and story.now >= asks[model]:
                waits[model] = (story.ask(model), story.now)
        story.tick(1)
        for engine in list(story.fleet.engines.values()):
            if engine.state is EngineState.STOPPING:
                story.exited(engine.model, "stopped", expected=True, after=0)
            elif engine.state is EngineState.LOADING and story.now >= engine.started + 60:
                story.got_ready(engine.model, after=0)
                story.opened(engine.model)
                story.used(engine.model)
            elif engine.state is EngineState.DRAINING and not engine.drained:
                story.drained(engine.model)
    assert not asks, "both were answered"
    assert len(story.ever(StartEngine)) <= 3


@pytest.mark.parametrize(
    ("load_s", "timeout_s", "pause_s"), [(90, 60, 5), (150, 120, 10), (400, 300, 10), (700, 600, 8)]
)
def test_a_client_whose_timeout_is_shorter_than_the_load_is_answered(
    load_s: float, timeout_s: float, pause_s: float
) -> None:
    """ollama/ollama#8006: it gives up, and asks again a little later."""
    story = begin(a_model("a"))
    ticket = story.ask("a")
    story.on(ev.WaiterLeft(ticket), timeout_s)
    for _ in range(int(pause_s)):
        story.tick(1)
    ticket = story.ask("a")
    story.got_ready("a", load_s - timeout_s - pause_s)
    story.opened("a")
    assert story.answers()[ticket].error is None
    assert len(story.ever(StartEngine)) == 1


def test_somebody_new_keeps_the_load_alive() -> None:
    story = begin(a_model("a"))
    story.on(ev.WaiterLeft(story.ask("a")))
    ticket = story.ask("a", after=1.5)
    story.tick(10)
    assert not story.effects
    story.loaded("a")
    assert story.answers()[ticket].error is None


def test_a_wish_is_a_load_without_a_waiter() -> None:
    story = begin(a_model("a"))
    story.on(ev.LoadAsked("a"))
    story.tick(10)
    story.loaded("a")
    assert not story.fleet.requested_until


def test_a_failed_load_is_tried_again_with_back_off_and_the_waiter_waits_on() -> None:
    story = begin(a_model("a"))
    ticket = story.ask("a")
    story.exited("a")
    story.tick(1.9)
    assert not story.said(StartEngine)
    story.tick(0.2)
    assert story.said(StartEngine)
    story.exited("a")
    story.tick(3.9)
    assert not story.said(StartEngine), "twice as long"
    story.tick(0.2)
    story.loaded("a")
    assert story.answers()[ticket].error is None
    assert not story.fleet.failures, "a success resets"


def test_after_three_failures_waiters_get_the_last_words_and_harm_is_done_to_nobody_else() -> None:
    story = begin(a_model("bad", 2), a_model("good", 2))
    good = story.ask("good")
    story.loaded("good")
    ticket = story.ask("bad")
    fail(story, "bad", 3)
    error = told(story, ticket)
    assert isinstance(error, ModelUnavailable)
    assert "out of memory" in str(error.detail)
    assert model_state(story.fleet, "bad") == "failed"
    at_once = told(story, story.ask("bad"))
    assert at_once.retry_after_s is not None
    assert at_once.retry_after_s <= 8.0
    assert not story.said(StartEngine)
    story.tick(8)
    late = story.ask("bad")
    assert story.said(StartEngine), "one new try"
    story.exited("bad")
    assert isinstance(told(story, late), ModelUnavailable)
    assert story.answers()[good].error is None
    assert not story.ever(DrainRoute)


def test_what_an_engine_said_is_for_administrators() -> None:
    """Its words may hold paths, hosts, and what others asked; also where its agent is older than the summary."""
    words = "/scratch/eve/model on n3: ValueError: prompt 'my secret' is too long"
    for summary, told_to_users in (("it ended with exit code 1", "it ended with exit code 1"), ("", "it failed")):
        story = begin(a_model("bad", 2))
        tickets = [story.ask("bad") for _ in range(2)]
        for _ in range(3):
            while not story.fleet.model_engines.get("bad"):
                story.tick(1)
            engine = story.engine("bad")
            story.on(ev.EngineExited(engine.id, f"exit code 1: {words}", False, summary))
            story.on(ev.RouteClosed(engine.id))
        tickets.append(story.ask("bad"))
        errors = [told(story, ticket) for ticket in tickets]
        for_users = [*(error.body() for error in errors), *models_view(story.fleet, story.now)]
        assert all(told_to_users in str(one) for one in for_users)
        assert words not in str(for_users)
        for_administrators = [
            *(error.body(detail=True) for error in errors),
            *models_view(story.fleet, story.now, detail=True),
            *status_view(story.fleet, story.now)["models"],
        ]
        assert all(words.partition(" ")[0] in str(one) for one in for_administrators)


def test_what_an_agent_said_is_for_administrators() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind()), nodes=())
    ticket = story.ask("a", wait_s=5)
    (made,) = story.said(CreateAgent)
    story.on(ev.NodeFailed(made.node, "OSError: /scratch/eve/secret"))
    story.tick(6)
    error = told(story, ticket)
    assert isinstance(error, WaitDeadline)
    assert "/scratch/eve" not in str(error.body())
    assert "no cpu node can be had" in error.message
    assert "/scratch/eve" in str(error.body(detail=True))


def test_a_load_that_takes_too_long_is_a_failure() -> None:
    story = begin(a_model("a", load_timeout=100))
    story.ask("a")
    story.tick(99)
    assert not story.effects
    story.tick(1)
    assert [stop.reason for stop in story.said(StopEngine)] == ["load-timeout"]
    assert "not ready within 100 s" in story.fleet.failures["a"].reason


def test_an_engine_that_dies_is_loaded_again_when_somebody_asks_at_once() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    story.loaded("a")
    story.on(ev.EngineExited("a-1-1", "killed", False), 60)
    assert story.effects == (CloseRoute("a-1-1", 0, 0), SyncSlots({"a": 0}, apart=frozenset({"a"})))
    assert not story.fleet.failures
    story.ask("a")
    assert story.said(StartEngine)


def test_an_engine_that_dies_as_soon_as_it_is_ready_again_and_again_is_not_loaded_for_ever() -> None:
    story = begin(a_model("a", pinned=True))
    story.tick()
    starts = []
    for _ in range(5):
        while not story.fleet.model_engines.get("a"):
            story.tick(1)
        starts.append(story.now)
        story.loaded("a")
        story.exited("a", "killed by signal 11")
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert gaps[0] < 12, "the first time may be an accident"
    assert gaps == sorted(gaps)
    assert gaps[-1] > gaps[0] + 5


def test_engines_that_die_young_under_requests_are_loaded_again_until_it_is_clear_that_none_answers() -> None:
    """What killed them may be one of the requests (``serve.ingress.trials``)."""
    story = begin(a_model("a"))
    most = story.fleet.policy.crashes_per_wait
    for number in range(most):
        ticket = story.ask("a")
        assert len(story.ever(StartEngine)) == number + 1, "at once"
        story.loaded("a")
        assert story.answers()[ticket].error is None
        story.exited("a", "killed by signal 11")
    assert isinstance(told(story, story.ask("a")), ModelUnavailable)


def test_an_answer_shows_that_a_model_does_not_crash_by_itself() -> None:
    story = begin(a_model("a", aliases=("b",)))
    for _ in range(30):
        story.ask("a")
        story.loaded("a")
        story.on(ev.ModelAnswered("b"))
        assert not story.fleet.failures
        story.exited("a", "killed by signal 11")


def test_unload_refuses_waiters_and_drains_and_a_new_request_loads_afresh() -> None:
    story = begin(a_model("a", pinned=True))
    story.tick()
    story.loaded("a")
    story.seen("a", in_flight=1)
    story.on(ev.UnloadAsked("a"))
    assert story.said(DrainRoute)
    assert not story.fleet.pinned
    late = story.ask("a")
    story.drained("a")
    assert story.said(StopEngine), "not taken back"
    story.exited("a", expected=True)
    assert story.ever(StartEngine)[-1].model.name == "a"
    story.on(ev.UnloadAsked("a"))
    assert isinstance(told(story, late), Unloaded)
    assert story.said(StopEngine), "a load is stopped at once"


def test_at_the_gateways_end_every_waiter_is_told_and_what_serves_goes_on() -> None:
    story = begin(a_model("a", 2, pinned=True), a_model("b", 4), a_model("c", 2))
    story.tick()
    story.loaded("a")
    waiters = [story.ask("b"), story.ask("c"), story.ask("c")]
    story.on(ev.LoadAsked("b"))
    story.on(ev.GatewayCloses())
    for ticket in waiters:
        error = told(story, ticket)
        assert isinstance(error, GoingDown)
        assert (error.status, error.headers()["Retry-After"]) == (503, "30")
    assert not story.fleet.waiters
    assert not story.fleet.requested_until, "nothing is loaded, and no block asked for, that nobody comes back to"
    warm = story.ask("a")
    assert story.answers()[warm].error is None, "a request that was let in before finds its model"
    late = story.ask("c")
    story.on(ev.GatewayCloses())
    assert isinstance(told(story, late), GoingDown)


def test_a_model_that_leaves_the_catalog_is_drained_and_its_waiters_hear_of_it() -> None:
    story = begin(a_model("a", 2), a_model("b", 2))
    story.ask("a")
    story.loaded("a")
    story.seen("a", in_flight=1)
    ticket = story.ask("b")
    story.on(ev.CatalogChanged(()))
    assert isinstance(told(story, ticket), ModelNotFound)
    assert [drain.engine for drain in story.said(DrainRoute)] == ["a-1-1"]
    assert [stop.engine for stop in story.said(StopEngine)] == ["b-1-2"]
    story.drained("a")
    assert [stop.reason for stop in story.said(StopEngine)] == ["catalog"]


def test_a_changed_model_is_loaded_again_but_one_kept_longer_is_not() -> None:
    story = begin(a_model("a"))
    story.ask("a")
    story.loaded("a")
    story.on(ev.CatalogChanged((a_model("a", keep_alive=90),)))
    assert not story.said(DrainRoute)
    story.on(ev.CatalogChanged((a_model("a", keep_alive=90, args=("--dtype", "float32")),)))
    assert story.said(DrainRoute)


def test_requests_before_the_controller_has_settled_wait() -> None:
    story = Story(initial(a_policy(a_kind())))
    early = story.ask("a")
    assert not story.effects
    story.on(ev.CatalogChanged((a_model("a"),)))
    story.on(ev.Started(1, {}, (), ("cpu-0-0",)))
    unknown = story.ask("zzz")
    assert isinstance(told(story, unknown), ModelNotFound)
    assert not story.ever(StartEngine)
    story.join()
    assert story.said(StartEngine)
    story.loaded("a")
    assert story.effects == (Answer(early),)


def test_who_was_told_when_to_come_back_finds_the_block_still_in_the_queue() -> None:
    """The queue is longer than anybody waits: its job must not lose its place when the last client has given up."""
    story = begin(a_model("a"), policy=a_policy(a_kind(most=1), pending_idle_s=120.0), nodes=())
    ticket = story.ask("a", wait_s=1800.0)
    story.tick(2)
    (asked,) = story.ever(CreateAgent)
    story.blocks(a_block(asked.node, starts=story.now + 7200.0, phase="pending"))
    story.tick(1800.0)
    error = story.answers()[ticket].error
    assert isinstance(error, WaitDeadline)
    assert error.retry_after_s is not None
    story.tick(error.retry_after_s - 60.0)
    assert not story.ever(KillAgent)
    late = story.ask("a", after=30.0)
    story.join(asked.node)
    story.loaded("a")
    assert story.answers()[late].error is None
    assert not story.fleet.requested_until


def test_who_does_not_come_back_is_not_waited_for_for_ever() -> None:
    story = begin(a_model("a"), policy=a_policy(a_kind(most=1), pending_idle_s=120.0), nodes=())
    ticket = story.ask("a", wait_s=60.0)
    story.tick(2)
    story.blocks(a_block("cpu-1-1", starts=story.now + 600.0, phase="pending"))
    story.tick(60.0)
    error = story.answers()[ticket].error
    assert isinstance(error, WaitDeadline)
    story.tick((error.retry_after_s or 0.0) + 121.0)
    story.tick(121.0)
    assert len(story.ever(KillAgent)) == 1


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_eta() -> None:
    story = begin(a_model("a"), policy=a_policy(load_guess_s=40.0))
    hasty = told(story, story.ask("a", deadline_s=39.0))
    assert isinstance(hasty, DeadlineTooEarly)
    assert hasty.eta_s == 40.0
    assert hasty.headers() == {"Retry-After": "40", "x-gateway-position": "1", "x-should-retry": "false"}
    assert not story.fleet.waiters
    assert not story.fleet.engines, "its load is left to who waits for it"
    patient = story.ask("a", deadline_s=45.0)
    assert story.fleet.waiters[patient].deadline == story.now + 45.0
    story.tick(20)
    assert isinstance(told(story, story.ask("a", deadline_s=10.0)), DeadlineTooEarly), "20 s are left of the load"
    story.ask("a", deadline_s=25.0)
    story.tick(25.5)
    late = told(story, patient)
    assert isinstance(late, WaitDeadline)
    assert not isinstance(late, DeadlineTooEarly)


def test_a_deadline_ends_no_wait_that_is_shorter_and_none_where_the_eta_is_not_known() -> None:
    story = begin(a_model("gpu", 4, gpus=1), policy=a_policy(a_kind("gpu", gpus=(8,))), nodes=())
    ticket = story.ask("gpu", deadline_s=1.0)
    assert ticket in story.fleet.waiters, "nobody knows how long a job waits in the queue"
    other = story.ask("gpu", wait_s=5.0, deadline_s=60.0)
    assert story.fleet.waiters[other].deadline == story.now + 5.0


def test_who_is_refused_hears_its_position() -> None:
    story = begin(a_model("a"))
    first = story.ask("a", wait_s=100, requester=ev.Requester("k1"))
    batch = story.ask("a", wait_s=50, after=1, requester=ev.Requester("k2", priority=ev.Priority.BATCH))
    second = story.ask("a", wait_s=50, after=1, requester=ev.Requester("k1"))
    other = story.ask("a", wait_s=50, after=1, requester=ev.Requester("k3"))
    story.tick(60)
    assert [told(story, ticket).position for ticket in (batch, second, other)] == [4, 3, 2]
    assert told(story, other).headers()["x-gateway-position"] == "2"
    assert told(story, other).body()["error"]["position"] == 2
    story.tick(100)
    assert told(story, first).position == 1
