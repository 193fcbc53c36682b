"""Stories of blocks that cannot be had: refused, dead at once, stuck in the queue; and of other kinds that go on."""

from __future__ import annotations

import pytest

from gateway_plugin.phases import BlockPhase
from gateway_plugin.schedulers.pending_reasons import never_clears
from serve.core import events as ev
from serve.core.effects import CreateAgent, KillAgent
from serve.core.forecast import why_none
from serve.core.policy import Policy
from serve.core.room import Need
from serve.core.state import Cause
from serve.core.views.status import status_view
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin

CPU, BIG = a_kind("cpu", 6, most=3), a_kind("big", 60, most=2)


def story(policy: Policy | None = None) -> Story:
    return begin(a_model("a"), a_model("b"), a_model("huge", 50), policy=policy or a_policy(CPU, BIG), nodes=())


def block(name: str, phase: str, asked: float, **fields: object) -> ev.SeenBlock:
    """A block of the type that its name begins with."""
    stuck = phase == "pending" and never_clears(str(fields.get("reason")))
    said = {"never_clears": stuck, **fields}
    return ev.SeenBlock(name, name.split("-")[0], BlockPhase(phase), asked, **said)  # type: ignore[arg-type]


def refused(name: str, at: float) -> ev.SeenBlock:
    return block(name, "failed", at, reason="sbatch: error: slurm_submit: Unable to contact controller", ended_at=at)


def died(name: str, at: float, after: float = 5.0) -> ev.SeenBlock:
    """Started at ``at``."""
    said = "its script left with exit code 127 on n1"
    return block(name, "failed", at - 10, job="7", reason=said, starts_at=at, ended_at=at + after)


def kind(told: Story, name: str) -> dict[str, object]:
    shown: dict[str, object] = next(row for row in status_view(told.fleet, told.now)["types"] if row["type"] == name)
    return shown


# --- refused by the scheduler ---
def test_a_refused_block_is_asked_for_again_after_a_back_off_that_doubles_and_never_gives_up() -> None:
    told = story(a_policy(CPU))
    told.ask("a", wait_s=1e6)
    ledger: list[ev.SeenBlock] = []
    waits = []
    for number in range(7):
        assert len(told.said(CreateAgent)) == 1
        ledger.append(refused(f"cpu-{number}", told.now))
        told.on(ev.BlocksSeen(tuple(ledger)), after=0.0)
        assert told.said(KillAgent), "the pending agent is taken back, or Ray would ask again by itself"
        began = told.now
        while not told.said(CreateAgent):
            told.tick(1)
        waits.append(told.now - began)
    assert waits == [5, 10, 20, 40, 60, 60, 60]
    assert told.fleet.waiters, "waiters wait on: schedulers come back"
    assert "could not be submitted" in str(kind(told, "cpu")["trouble"])
    assert "Unable to contact controller" in str(why_none(told.fleet, Need(0, 4 * GIB), told.now)), (
        "waiters hear it too"
    )
    told.on(ev.BlocksSeen((*ledger, block("cpu-x", "pending", told.now, job="8", reason="Priority"))))
    assert kind(told, "cpu")["trouble"] is None
    assert not told.said(KillAgent)


def test_a_refusal_does_not_cost_the_job_that_is_in_the_queue() -> None:
    told = begin(a_model("a", 5), a_model("b", 5), policy=a_policy(CPU), nodes=())
    told.ask("a")
    told.ask("b")
    assert len(told.ever(CreateAgent)) == 2
    queued = block("cpu-1", "pending", told.now, job="7", reason="Resources")
    told.on(ev.BlocksSeen((queued, refused("cpu-2", told.now + 1))))
    assert [kill.node for kill in told.said(KillAgent)] == [told.ever(CreateAgent)[1].node]
    told.tick(4)
    assert not told.effects


def test_after_a_back_off_one_node_is_asked_for_and_the_others_when_it_is_had() -> None:
    told = begin(*(a_model(f"m{i}", 5) for i in range(3)), policy=a_policy(CPU), nodes=())
    told.ask("m0")
    told.on(ev.BlocksSeen((refused("cpu-1", told.now),)))
    told.ask("m1")
    told.ask("m2")
    told.tick(10)
    assert len(told.said(CreateAgent)) == 1
    told.tick(10)
    assert not told.effects
    taken = block("cpu-2", "pending", told.now, job="8", reason="Resources")
    told.on(ev.BlocksSeen((refused("cpu-1", 1000.0), taken)))
    assert len(told.said(CreateAgent)) == 2


# --- dies early ---
def dying(told: Story, many: int = 3) -> tuple[ev.SeenBlock, ...]:
    """A request came, and so many blocks of ``cpu`` died, the last one now."""
    told.ask("a", wait_s=1e6)
    ledger = tuple(died(f"cpu-{i}", told.now + 10 * i) for i in range(many))
    told.on(ev.BlocksSeen(ledger), after=10.0 * many - 5)
    return ledger


def test_three_early_deaths_in_a_row_and_the_kind_is_left_alone_for_half_an_hour() -> None:
    told = story(a_policy(CPU))
    dying(told, 2)
    assert not told.effects, "two may be bad luck"
    told = story(a_policy(CPU))
    ledger = dying(told)
    assert told.said(KillAgent)
    error = told.answers()["t1"].error
    assert error is not None
    assert (error.status, error.code, error.retry_after_s) == (503, "no_blocks", 1800.0)
    assert "'cpu'" in error.message
    assert "exit code 127 on n1" in error.message
    assert "gateway blocks retry cpu" in error.message
    assert kind(told, "cpu")["retry_in_s"] == 1800.0
    assert told.ask("a") in told.answers(), "who comes later is told at once"
    told.tick(1790)
    assert not told.ever(CreateAgent)[1:]
    late = told.ask("a", after=11)
    assert len(told.said(CreateAgent)) == 1, "then it is tried again"
    assert late not in told.answers()
    told.on(ev.BlocksSeen((*ledger, died("cpu-9", told.now + 5))), after=10)
    assert late in told.answers(), "a fourth death: again half an hour"
    assert kind(told, "cpu")["retry_in_s"] == 1800.0


def test_a_block_that_lives_ends_the_trouble() -> None:
    told = story(a_policy(CPU))
    ledger = dying(told)
    told.ask("a", after=1801)
    node = told.said(CreateAgent)[0].node
    running = block(f"block-{node}", "running", told.now, job="9", starts_at=told.now + 5)
    running = ev.SeenBlock(**{**vars(running), "type": "cpu"})
    told.on(ev.BlocksSeen((*ledger, running)), after=6)
    assert kind(told, "cpu")["trouble"] is not None, "it runs; whether it lives is not known yet"
    told.join(node)
    assert kind(told, "cpu")["trouble"] is None
    told.ask("huge")
    told.ask("b")
    told.on(ev.BlocksSeen((*ledger, running)), after=60)
    assert kind(told, "cpu")["trouble"] is None


def test_an_old_block_that_lives_says_nothing_of_new_ones() -> None:
    told = begin(a_model("a", 5), a_model("b", 5), policy=a_policy(CPU), nodes=("cpu-0-0",))
    old = ev.SeenBlock("block-cpu-0-0", "cpu", BlockPhase.RUNNING, 100.0, job="1", starts_at=150.0)
    told.on(ev.BlocksSeen((old, *(died(f"cpu-{i}", told.now + i) for i in range(3)))), after=10)
    assert kind(told, "cpu")["trouble"] is not None
    told.ask("a")
    told.loaded("a")
    waits = told.ask("b")
    told.seen("a", in_flight=1)
    told.tick(5)
    assert waits not in told.answers(), "the old node may make room"


def test_what_counts_as_an_early_death() -> None:
    told = story(a_policy(CPU))
    start = told.now
    slow = died("cpu-0", start, after=61.0)  # not within a minute, but its node never joined
    gone = block("cpu-1", "lost", start, job="8", ended_at=start + 300)
    told.on(ev.BlocksSeen((slow, gone, died("cpu-2", start + 200))), after=400)
    assert told.fleet.backoffs["cpu"].cause is Cause.CRASH_LOOP
    for innocent in ("cancelled", "expired", "completed"):
        told = story(a_policy(CPU))
        ended = [
            ev.SeenBlock(**{**vars(died(f"cpu-{i}", told.now + i)), "phase": BlockPhase(innocent)}) for i in range(5)
        ]
        told.on(ev.BlocksSeen(tuple(ended)), after=10)
        assert not told.fleet.backoffs


def test_a_new_controller_reads_the_trouble_off_the_ledger() -> None:
    told = story(a_policy(CPU))
    past = told.now - 600  # before its time: whether nodes joined is not known, only how long they lived
    told.on(ev.BlocksSeen(tuple(died(f"cpu-{i}", past + i) for i in range(3))))
    assert told.ask("a") in told.answers()
    told = story(a_policy(CPU))
    told.on(ev.BlocksSeen(tuple(died(f"cpu-{i}", past + i, after=120.0) for i in range(3))))
    assert told.ask("a") not in told.answers()


def test_an_administrator_may_ask_for_it_again() -> None:
    told = story(a_policy(CPU))
    ledger = dying(told)
    told.on(ev.NodeTypeRetryAsked("cpu"), after=60)
    late = told.ask("a")
    assert len(told.said(CreateAgent)) == 1
    told.on(ev.BlocksSeen((*ledger, died("cpu-9", told.now + 5))), after=10)
    assert late not in told.answers(), "what was before is forgiven: this is the first of a new row"
    assert kind(told, "cpu")["trouble"] is None


def test_other_kinds_go_on() -> None:
    told = story()
    dying(told)
    assert [ask.type for ask in told.said(CreateAgent)] == ["big"], "the next larger kind that can hold it"
    assert "t1" not in told.answers()
    told.ask("huge", after=5)
    assert told.ask("huge") not in told.answers()
    assert kind(told, "big")["trouble"] is None


# --- stuck in the queue ---
def test_a_reason_that_never_clears_is_news() -> None:
    told = story()
    told.ask("a", wait_s=1e6)
    stuck = block("cpu-1", "pending", told.now, job="7", reason="PartitionTimeLimit")
    told.on(ev.BlocksSeen((stuck,)), after=3)
    assert [kill.node for kill in told.said(KillAgent)] == [told.ever(CreateAgent)[0].node]
    assert [ask.type for ask in told.said(CreateAgent)] == ["big"]
    assert "pends with 'PartitionTimeLimit'" in str(kind(told, "cpu")["trouble"])
    gone = ev.SeenBlock(**{**vars(stuck), "phase": BlockPhase.CANCELLED, "ended_at": told.now + 30})
    told.on(ev.BlocksSeen((gone,)), after=31)
    assert kind(told, "cpu")["retry_in_s"] == pytest.approx(1769), "it is remembered when the block is gone"
    told.ask("b")
    told.tick(1770)
    assert kind(told, "cpu")["retry_in_s"] == 0


def test_a_stuck_kind_is_refused_and_free_again_when_a_block_of_it_starts() -> None:
    told = story(a_policy(CPU))
    told.ask("a", wait_s=1e6)
    stuck = block("cpu-1", "pending", told.now, job="7", reason="QOSMaxWallDurationPerJobLimit")
    told.on(ev.BlocksSeen((stuck,)), after=3)
    error = told.answers()["t1"].error
    assert error is not None
    assert "QOSMaxWallDurationPerJobLimit" in error.message
    running = ev.SeenBlock(
        **{
            **vars(stuck),
            "phase": BlockPhase.RUNNING,
            "reason": None,
            "never_clears": False,
            "starts_at": told.now + 20,
        }
    )
    told.on(ev.BlocksSeen((running,)), after=25)
    assert kind(told, "cpu")["trouble"] is None


def test_min_nodes_of_a_kind_in_trouble_are_not_asked_for_until_its_retry() -> None:
    told = story(a_policy(a_kind("cpu", 6, least=1, most=2)))
    stuck = block("cpu-1", "pending", told.now, job="7", reason="AssocGrpCPUMinutesLimit")
    told.on(ev.BlocksSeen((stuck,)))
    assert told.said(KillAgent)
    told.on(ev.BlocksSeen(()))
    told.tick(1700)
    assert len(told.ever(CreateAgent)) == 1
    told.tick(101)
    assert len(told.ever(CreateAgent)) == 2
