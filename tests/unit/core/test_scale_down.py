"""Stories of nodes given back: which, when, in which order, and which never."""

from __future__ import annotations

import pytest

from serve.core import events as ev
from serve.core.effects import CreateAgent, DrainRoute, KillAgent, StopEngine
from serve.core.policy import Policy
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin

KIND = a_kind("cpu", 6, most=4)
FOREVER = {"keep_alive": -1}


def policy(**fields: object) -> Policy:
    known: dict[str, object] = {"block_idle_s": 300.0, "block_unused_s": 600.0, "last_block_idle_s": 3600.0}
    return a_policy(KIND, **{**known, **fields})


def two_nodes(**fields: object) -> Story:
    """Model a on one node, b on another, both kept for ever, nobody waiting."""
    told = begin(
        a_model("a", 5, **FOREVER), a_model("b", 5, **FOREVER), a_model("c", 2), policy=policy(**fields), nodes=()
    )
    for name in ("a", "b"):
        told.ask(name)
        told.tick(2)
        told.join(told.ever(CreateAgent)[-1].node)
        told.loaded(name)
        told.seen(name, in_flight=1)  # or it would make way for the next one
    for name in ("a", "b"):
        told.seen(name, in_flight=0)
    return told


def node_of(told: Story, model: str) -> str:
    return told.engine(model).node


def test_a_block_whose_models_are_all_unused_is_given_back_behind_drained_routes() -> None:
    told = two_nodes()
    first = node_of(told, "a")
    told.used("b", after=250)
    told.tick(70)
    assert not told.effects
    told.tick(30)
    assert [drain.engine for drain in told.said(DrainRoute)] == [told.engine("a").id], "keep_alive: -1 or not"
    told.drained("a")
    told.exited("a", expected=True)
    assert told.ever(KillAgent) == (KillAgent(first),)
    told.tick(100)
    assert not told.effects


def test_the_last_block_is_kept_longer() -> None:
    told = two_nodes()
    told.tick(601)
    assert len(told.said(DrainRoute)) == 1
    gone = "a" if told.engine("a").id == told.said(DrainRoute)[0].engine else "b"
    told.drained(gone)
    told.exited(gone, expected=True)
    told.tick(2900)
    assert len(told.ever(DrainRoute)) == 1
    told.tick(200)
    assert len(told.ever(DrainRoute)) == 2


def test_never_where_the_site_says_so() -> None:
    told = two_nodes(block_unused_s=None)
    told.tick(1e6)
    assert not told.ever(DrainRoute)


def test_one_model_in_use_keeps_its_block() -> None:
    for pinned in (True, False):
        told = two_nodes()
        told.on(ev.PinChanged("b", True))
        if pinned:
            told.on(ev.PinChanged("a", True))
        else:
            told.seen("a", in_flight=1)
        told.tick(100_000)
        assert not told.ever(DrainRoute)


def test_of_two_that_are_due_the_one_that_costs_least_to_lose_goes() -> None:
    told = two_nodes(last_block_idle_s=1e9)
    slow = told.engine("a")
    told.on(ev.EngineReady(slow.id, slow.address, 10.0))
    told.fleet = told.fleet.__class__(**{**vars(told.fleet), "load_s": {"a": 900.0, "b": 20.0}})
    told.tick(601)
    assert [drain.engine for drain in told.said(DrainRoute)] == [told.engine("b").id], "a takes a quarter of an hour"
    told = two_nodes(last_block_idle_s=1e9)
    told.used("a", after=100)
    told.used("b", after=50)
    told.tick(620)
    assert [drain.engine for drain in told.said(DrainRoute)] == [told.engine("a").id], "unused for longer"


def test_an_empty_block_goes_before_one_with_models() -> None:
    told = two_nodes(block_idle_s=600.0, last_block_idle_s=1e9)
    told.on(ev.UnloadAsked("b"))
    told.drained("b")
    told.exited("b", expected=True)
    empty = told.fleet.nodes
    told.tick(650)
    assert [kill.node for kill in told.said(KillAgent)] == [n.id for n in empty.values() if not n.engines]
    assert not told.ever(DrainRoute)[1:]


def test_what_is_pending_without_a_use_is_cancelled_before_a_block_that_runs() -> None:
    told = begin(a_model("a", 5), a_model("b", 5), policy=policy(pending_idle_s=1e6), nodes=("cpu-0-0", "cpu-0-1"))
    told.ask("a")
    told.loaded("a")
    told.seen("a", in_flight=1)
    told.ask("b")
    told.loaded("b")
    told.seen("b", in_flight=1)
    told.on(ev.CatalogChanged((a_model("a", 5), a_model("b", 5), a_model("d", 5))))
    told.ask("d")
    told.tick(2)
    pending = told.ever(CreateAgent)[-1].node
    told.on(ev.WaiterLeft("t3"))
    told.on(ev.UnloadAsked("b"))
    told.drained("b")
    told.exited("b", expected=True)
    told.seen("a", in_flight=1)
    told.tick(301)
    kills = [kill.node for kill in told.ever(KillAgent)]
    assert kills[0] == pending
    assert len(kills) == 2


def test_min_nodes_stay_whatever_is_unused() -> None:
    told = begin(a_model("a", 5, **FOREVER), policy=a_policy(a_kind("cpu", 6, least=2, most=4)), nodes=())
    for ask in told.ever(CreateAgent):
        told.join(ask.node)
    told.ask("a")
    told.loaded("a")
    told.tick(1e6)
    assert not told.ever(KillAgent)
    assert not told.ever(DrainRoute)


def with_sleepers(**fields: object) -> Story:
    """``a`` sleeps on a node without another engine; ``pinned`` is on another node."""
    kind = a_kind("gpu", 4, gpus=(10,), most=2)
    models = a_model("a", 4, gpus=1, keep_alive=60), a_model("c", 6, gpus=1), a_model("pinned", 10, gpus=1, pinned=True)
    nodes = ("gpu-0-0", "gpu-0-1")
    told = begin(
        *models, policy=a_policy(kind, sleep_once_loaded=False, block_idle_s=200, **fields), nodes=nodes,
        host_gib=4, gpus=(10,), sleep_mib=40 * GIB,
    )  # fmt: skip
    told.loaded("pinned")
    told.ask("a")
    told.loaded("a", can_sleep=True)
    return told


def a_sleeps(told: Story) -> None:
    told.used("a")
    told.tick(61)
    told.drained("a")
    told.on(ev.EngineAsleep(told.engine("a").id, 4 * GIB, 1.0, 0), 1.0)


@pytest.mark.parametrize("block_unused_s", [1800.0, None])
def test_a_block_with_none_but_sleepers_is_given_back_like_an_empty_one(block_unused_s: float | None) -> None:
    told = with_sleepers(block_unused_s=block_unused_s)
    a_sleeps(told)
    told.tick(199)
    assert not told.effects
    told.tick(2)
    assert [(stop.engine, stop.reason) for stop in told.said(StopEngine)] == [(told.engine("a").id, "node-leaving")]
    gone = node_of(told, "a")
    told.exited("a", expected=True)
    assert told.ever(KillAgent) == (KillAgent(gone),)


def test_and_not_before_the_last_one_awake_has_been_gone_for_as_long() -> None:
    told = with_sleepers()
    told.ask("c")
    told.loaded("c")
    a_sleeps(told)
    for _ in range(60):
        told.used("c", after=5)
    told.on(ev.UnloadAsked("c"))
    told.drained("c")
    told.exited("c", expected=True)
    told.tick(190)
    assert not told.ever(StopEngine)[1:]
    told.tick(20)
    assert [stop.reason for stop in told.said(StopEngine)] == ["node-leaving"]
