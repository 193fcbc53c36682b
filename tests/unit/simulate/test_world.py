"""The simulated world: results known by hand, and what must hold whatever the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.core import effects as ef
from serve.core import events as ev
from serve.core.step import LRU
from serve.simulate.baselines import POLICIES, Fifo
from serve.simulate.deciders import Core
from serve.simulate.edge import EDGE_S
from serve.simulate.generators import SHAPES
from serve.simulate.house import House
from serve.simulate.metrics import Outcome, Tally
from serve.simulate.parts import Decider, Fleet
from serve.simulate.times import Times
from serve.simulate.traces import Request, Session, Trace, of_user
from serve.simulate.world import INNER_S, World

SLOW = Times(1, 70, cold_s=30, wake_s=1, prompt_tokens_per_s=1e9, token_s=1.0, beside=1e9, stop_s=2)
"""One output token takes a second, whatever runs beside it."""
ONE = Fleet(1, 1)


def asked(at: float, model: str, seconds: int, user: str = "u") -> Request:
    return Request(at, model, 0, seconds, user)


def trace_of(*arrivals: Request, sessions: tuple[Session, ...] = ()) -> Trace:
    return Trace("t", {"A": SLOW, "B": SLOW}, arrivals, sessions)


def run(trace: Trace, decider: Decider, fleet: Fleet = ONE, patience_s: float = 1800.0) -> Tally:
    return World(trace, fleet, decider, patience_s=patience_s).run()


def test_a_cold_request_waits_for_its_load_and_a_warm_one_not_at_all() -> None:
    tally = run(trace_of(asked(10, "A", 5), asked(60, "A", 5)), Core())

    cold, warm = tally.waits_s
    assert cold == pytest.approx(30 + EDGE_S + INNER_S)
    assert warm == 0
    assert tally.outcomes == {Outcome.SERVED: 2}
    assert (tally.switches, tally.loads, tally.device_s_lost) == (0, 1, 30)
    assert tally.end_s == pytest.approx(65)
    assert tally.gpu_s == tally.end_s


def test_a_hot_model_spreads_over_free_room_and_answers_sooner_and_shrinks_again() -> None:
    # each request alone takes 4 s, and twice as long beside 8 others; 3 a second for five minutes, then one a minute
    times = replace(SLOW, gib=30, beside=8)
    arrivals = [asked(number / 3, "A", 4) for number in range(900)]
    arrivals += [asked(300 + 60 * number, "A", 4) for number in range(1, 16)]
    answer_s: dict[int, dict[float, float]] = {}
    engines: dict[int, list[int]] = {}
    for most in (1, 3):
        took = answer_s[most] = {}
        many = engines[most] = []

        class Watched(World):
            def _ends(self, number: int, outcome: Outcome) -> None:
                one = self.pending[number]
                took[one.came] = self.clock.now - one.came  # noqa: B023 - the run ends within this turn
                many.append(len(self.engines))  # noqa: B023
                super()._ends(number, outcome)

        entry = {"replicas_max": most, "target_in_flight": 8}
        tally = Watched(Trace("t", {"A": times}, arrivals), Fleet(3, 3), Core(), entry=entry).run()
        assert tally.outcomes == {Outcome.SERVED: 915}

    def p95(most: int) -> float:
        """Of the requests that came after all engines had loaded, until the load ended."""
        took = sorted(took for came, took in answer_s[most].items() if 100 <= came < 300)
        return took[int(0.95 * len(took))]

    assert max(engines[1]) == 1
    assert max(engines[3]) == 3
    assert p95(3) < 0.5 * p95(1), (p95(1), p95(3))
    assert engines[3][-1] == 1, "it goes back after the load has ended"


def test_the_gateway_leaves_a_busy_engine_alone_and_drains_an_idle_one() -> None:
    # A loads until 30, works until 130; B comes at 40: A is idle at 130, seen so at the next reading of the counters
    tally = run(trace_of(asked(0, "A", 100), asked(40, "B", 5)), Core())

    (first, second) = tally.waits_s
    idle_at = first + 100
    assert idle_at + 2 + 30 - 40 < second < idle_at + 2 + 30 - 40 + 1.5
    assert (tally.switches, tally.loads) == (1, 2)
    states = [(span.model, span.state) for span in tally.spans]
    assert states == [
        ("A", "loading"), ("A", "ready"), ("A", "draining"), ("A", "stopping"), ("B", "loading"), ("B", "ready"),
    ]  # fmt: skip


def test_a_busy_model_starves_another_under_lru_and_keeps_it_waiting_within_its_bound_under_the_gateway() -> None:
    hot = [asked(second, "A", 3) for second in range(400)]
    arrivals = sorted((*hot, asked(100.5, "B", 1, "v")), key=lambda one: one.at)

    lru, ours, fifo = (
        run(trace_of(*arrivals), Core(policies=LRU)),
        run(trace_of(*arrivals), Core()),
        run(trace_of(*arrivals), House(Fifo())),
    )

    assert max(lru.waits_s) > 300
    assert lru.switches == 1
    assert max(ours.waits_s) < 4 * 30, "four loads"
    assert ours.switches >= 2
    assert max(fifo.waits_s) < 120


def test_two_models_asked_in_turns_by_open_clients_are_served_in_batches() -> None:
    quick = replace(SLOW, cold_s=3)
    arrivals = tuple(asked(number * 0.5, "AB"[number % 2], 1) for number in range(40))

    tally = run(Trace("t", {"A": quick, "B": quick}, arrivals, ()), Core())

    assert tally.outcomes == {Outcome.SERVED: 40}
    assert tally.switches <= 3, "one by one there would be 39"
    assert tally.end_s < 35


def test_a_closed_loop_sends_a_batch_when_the_one_before_is_answered() -> None:
    batches = ((asked(0, "A", 5), asked(1, "A", 5)), (asked(0, "A", 5),))
    tally = run(trace_of(sessions=(Session(10, batches, think_s=7),)), Core())

    # loaded at 40, both served by 45, thinks until 52
    assert tally.end_s == pytest.approx(10 + 30 + 5 + 7 + 5, abs=0.1)
    assert list(tally.waits_s)[2] == 0


def test_who_waits_past_patience_is_refused_and_counted_with_that_wait() -> None:
    tally = run(trace_of(asked(0, "A", 500), asked(40, "B", 5)), Core(), patience_s=60)

    assert tally.outcomes == {Outcome.SERVED: 1, Outcome.REFUSED: 1}
    assert sorted(tally.waits_s)[1] == pytest.approx(60, abs=0.6)


def test_jain_tells_one_user_behind_anothers_backlog() -> None:
    alone = run(trace_of(asked(0, "A", 100, "u"), asked(31, "A", 10, "v")), Core())
    behind = run(trace_of(asked(0, "A", 100, "u"), asked(31, "B", 10, "v")), Core())

    assert alone.jain > 0.98  # u loads for 30 of 130 s, v not at all
    assert behind.jain < 0.75  # v waits 130 s for 10 s of work


def test_users_are_compared_with_themselves_alone() -> None:
    both = trace_of(asked(0, "A", 100, "u"), asked(31, "B", 10, "v"))
    alone = {user: run(of_user(both, user), Core()).progress[user] for user in "uv"}
    tally = run(both, Core())

    assert alone == {"u": pytest.approx(100 / 130, abs=0.01), "v": pytest.approx(10 / 40, abs=0.01)}
    left = [1.0, tally.progress["v"] / alone["v"]]  # u as alone; v waits for u, too
    assert tally.jain_to(alone) == pytest.approx(sum(left) ** 2 / (2 * sum(one * one for one in left)), abs=0.01)
    assert tally.jain < tally.jain_to(alone) < 1, "that a model must be loaded at all is nobody's unfairness"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["abab-open", "class-of-30", "llmux-balanced", "agents"])
def test_every_request_has_one_outcome_and_a_run_can_be_repeated(policy: str, shape: str) -> None:
    trace = SHAPES[shape](2)
    trace = replace(trace, arrivals=tuple(trace.arrivals)[:60], sessions=trace.sessions[:4])
    fleet = Fleet(trace.gpus, trace.gpus_per_node)
    found = []
    for _ in range(2):
        decider = POLICIES[policy](trace)
        if decider is None:
            assert trace.sessions
            return
        world = World(trace, fleet, decider, patience_s=600)
        tally = world.run()
        found.append(tally.document())
    asked_for = len(tuple(trace.arrivals)) + sum(len(b) for s in trace.sessions for b in s.batches)
    assert tally.requests == len(tally.waits_s) == asked_for
    assert found[0] == found[1]
    assert tally.outcomes[Outcome.CUT] == 0, "only a drain's deadline cuts, and no request is that long"
    assert not world.pending
    given = [*trace.arrivals, *(one for session in trace.sessions for batch in session.batches for one in batch)]
    work_s = sum(trace.times[one.model].alone_s(one.prompt_tokens, one.output_tokens) for one in given)
    if tally.outcomes == {Outcome.SERVED: asked_for}:
        assert tally.work_s == pytest.approx(work_s)
    assert sum(user.work_s for user in tally.users.values()) == pytest.approx(tally.work_s)


def test_the_gateways_engines_sleep_and_wake_where_nodes_have_host_memory() -> None:
    times = replace(SLOW, weights_gib=60, sleep_s=1, kept_gib=1)
    turns = tuple(asked(200.0 * turn, "AB"[turn % 2], 5) for turn in range(8))
    trace = Trace("t", {"A": times, "B": times}, turns)
    world = World(trace, Fleet(1, 1, host_gib=200), Core())
    tally = world.run()

    assert tally.outcomes == {Outcome.SERVED: 8}
    assert tally.loads == 2
    assert tally.wakes == 6  # each later turn
    assert max(list(tally.waits_s)[2:]) < 10
    assert {"falling-asleep", "asleep", "waking"} <= {span.state for span in tally.spans}
    cold = World(trace, ONE, Core()).run()
    assert (cold.loads, cold.wakes) == (8, 0)


def test_who_finds_a_full_engine_waits_at_the_edge_and_the_controller_hears_of_it_and_of_whom() -> None:
    class Listening(Core):
        def __init__(self) -> None:
            super().__init__()
            self.queued: list[int] = []
            self.users: set[str] = set()

        def tell(self, event: ev.Event, now: float) -> tuple[ef.Effect, ...]:
            if isinstance(event, ev.EdgeSeen):
                self.queued += [one.queued for one in event.servers]
            elif isinstance(event, ev.Acquire):
                self.users.add(event.requester.key)
            return super().tell(event, now)

    core = Listening()
    trace = replace(
        trace_of(*(asked(0, "A", 10, f"u{n}") for n in range(5))), times={"A": replace(SLOW, concurrency=2)}
    )
    tally = run(trace, core)

    assert [round(wait) for wait in tally.waits_s] == [30, 30, 40, 40, 50]
    assert max(core.queued) == 3
    assert core.users == {f"u{n}" for n in range(5)}


def test_waits_past_the_bound_are_counted() -> None:
    tally = run(trace_of(asked(0, "A", 500), asked(40, "B", 5)), Core())  # the bound is 120 s: four loads

    assert sorted(tally.waits_s)[1] > 120
    assert tally.past_bound == 1
