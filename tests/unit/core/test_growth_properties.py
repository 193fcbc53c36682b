"""What growth never does, whatever happens to its blocks: random demand, random ledgers, random times."""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway_plugin.phases import BlockPhase
from gateway_plugin.schedulers.pending_reasons import never_clears
from serve.core import events as ev
from serve.core.effects import CreateAgent, KillAgent
from serve.core.room import holds, need_of
from serve.core.state import Node, NodePhase
from tests.support.fleets import GIB, Story, a_kind, a_model, a_policy, begin

KINDS = (a_kind("s", 6, most=3), a_kind("m", 20, least=1, most=2), a_kind("g", 1, gpus=(40, 40), most=2))
MODELS = (a_model("a", 5), a_model("b", 5), a_model("c", 15), a_model("d", 15), a_model("e", 30, gpus=2))
POLICY = a_policy(*KINDS, block_idle_s=60.0, block_unused_s=120.0, last_block_idle_s=300.0, node_type_retry_s=200.0)
REASONS = ("Priority", "Resources", "PartitionTimeLimit", "AssocGrpCPUMinutesLimit", None)

names = st.sampled_from([model.name for model in MODELS])

few = settings(
    max_examples=int(os.environ.get("GATEWAY_EXAMPLES", "60")), phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "leave", "ledger", "join", "load", "unload", "wait", "gone", "retry"]),
        st.integers(0, 1000),
        st.sampled_from([0.5, 3.0, 20.0, 130.0]),
    ),
    max_size=50,
)


class Queue:
    """A scheduler in which anything may become of a block; its ledger is what the fleet is told."""

    def __init__(self) -> None:
        self.blocks: dict[str, ev.SeenBlock] = {}

    def something_happens(self, told: Story, pick: int, healthy: bool) -> None:
        pending = [node for node in told.fleet.nodes.values() if node.phase is NodePhase.PENDING]
        if pending:
            kind, now = pending[pick % len(pending)].type, told.now
            fates = {
                "failed": {"ended_at": now, "reason": "refused"},
                "died": {"ended_at": now, "job": "1", "starts_at": now - 5, "reason": "boom"},
                "pending": {
                    "job": "1",
                    "reason": (said := REASONS[pick % len(REASONS)]),
                    "never_clears": never_clears(said),
                },
                "running": {"job": "1", "starts_at": now},
                "cancelled": {"job": "1", "ended_at": now},
            }
            fate = "running" if healthy else sorted(fates)[pick // 7 % len(fates)]
            phase = {"died": "failed"}.get(fate, fate)
            name = f"gw-{kind}-{len(self.blocks)}"
            self.blocks[name] = ev.SeenBlock(name, kind, BlockPhase(phase), now - 10, **fates[fate])  # type: ignore[arg-type]
        told.on(ev.BlocksSeen(tuple(self.blocks.values())))


def play(told: Story, queue: Queue, what: str, pick: int, healthy: bool = False) -> None:
    """One thing happens, if it can."""
    nodes = sorted(told.fleet.nodes)
    engines = sorted(told.fleet.engines)
    waiters = sorted(told.fleet.waiters)
    if what == "ask":
        told.ask(MODELS[pick % len(MODELS)].name, wait_s=10_000)
    elif what == "leave" and waiters:
        told.on(ev.WaiterLeft(waiters[pick % len(waiters)]))
    elif what == "ledger":
        queue.something_happens(told, pick, healthy)
    elif what == "join":
        pending = [node for node in nodes if told.fleet.nodes[node].phase is NodePhase.PENDING]
        if pending:
            node = told.fleet.nodes[pending[pick % len(pending)]]
            kind = next(kind for kind in KINDS if kind.name == node.type)
            told.join(node.id, kind.host_mib // GIB, tuple(mib // GIB for mib in kind.gpu_mib))
    elif what == "load" and engines:
        engine = told.fleet.engines[engines[pick % len(engines)]]
        told.on(ev.EngineReady(engine.id, "h:1", 10.0))
        told.on(ev.RouteOpened(engine.id))
    elif what == "unload" and engines:
        engine = told.fleet.engines[engines[pick % len(engines)]]
        told.on(ev.EngineExited(engine.id, "gone", True))
        told.on(ev.RouteClosed(engine.id))
    elif what == "gone" and nodes and not healthy:
        told.on(ev.NodeGone(nodes[pick % len(nodes)], "lost"))
    elif what == "retry":
        told.on(ev.NodeTypeRetryAsked(KINDS[pick % len(KINDS)].name))


def of_kind(told: Story, kind: str) -> list[Node]:
    return [node for node in told.fleet.nodes.values() if node.type == kind]


@few
@given(steps)
def test_never_above_max_and_trouble_of_one_kind_never_blocks_another(what: list[tuple[str, int, float]]) -> None:
    told, queue = begin(*MODELS, policy=POLICY, nodes=()), Queue()
    for step, pick, after in what:
        play(told, queue, step, pick)
        told.tick(after)
        for kind in KINDS:
            nodes, backoff = of_kind(told, kind.name), told.fleet.backoffs.get(kind.name)
            assert len(nodes) <= kind.max_nodes
            if backoff is None and kind.name not in told.fleet.agent_failures:
                assert len(nodes) >= kind.min_nodes, "a healthy kind keeps its min_nodes"
        for ask in told.said(CreateAgent):
            backoff = told.fleet.backoffs.get(ask.type)
            assert backoff is None or told.now >= backoff.retry_at, "nothing is asked for before its time"
    told.tick(3)
    for name in told.fleet.queues:
        need = need_of(next(model for model in MODELS if model.name == name))
        healthy = [kind for kind in KINDS if holds(kind, need) and kind.name not in told.fleet.backoffs]
        if any(told.fleet.engines[engine] for engine in told.fleet.model_engines.get(name, ())):
            continue
        for kind in healthy:
            able = [node for other in KINDS if holds(other, need) for node in of_kind(told, other.name)]
            assert able, f"{name} waits, {kind.name} could hold it, and nothing is on its way"


@few
@given(steps)
def test_what_is_pending_is_credited(what: list[tuple[str, int, float]]) -> None:
    """No more pending nodes than waiting models, besides ``min_nodes``, at the moment one is asked for."""
    told, queue = begin(*MODELS, policy=POLICY, nodes=()), Queue()
    for step, pick, after in what:
        play(told, queue, step, pick)
        told.tick(after)
        if told.said(CreateAgent):
            pending = [node for node in told.fleet.nodes.values() if node.phase is NodePhase.PENDING]
            useful = [node for node in pending if node.idle_since is None]
            without = [name for name in told.fleet.queues if not told.fleet.model_engines.get(name)]
            assert len(useful) <= len(without) + sum(kind.min_nodes for kind in KINDS)


@few
@given(
    st.lists(st.tuples(names, st.floats(1.0, 100.0)), min_size=2, max_size=5, unique_by=lambda user: user[0]),
    st.integers(0, 100),
)
def test_no_flapping(users: list[tuple[str, float]], seed: int) -> None:
    """Models that are each used again before ``block_unused_s`` is over: after they have been loaded once, no node is
    asked for and none is given back."""
    periods = dict(users)
    plenty = replace(POLICY, node_types=tuple(replace(kind, max_nodes=5) for kind in KINDS))
    told, queue = begin(*MODELS, policy=plenty, nodes=()), Queue()
    for name in periods:
        told.ask(name, wait_s=10_000)
    for _ in range(12):
        told.tick(3)
        for step in ("ledger", "join", "load", "load", "load"):
            for pick in range(8):
                play(told, queue, step, pick, healthy=True)
        for name in periods:
            if told.fleet.model_engines.get(name):
                told.seen(name, in_flight=1)  # or it would make way for the others
    assert not told.fleet.queues
    for name in periods:
        told.seen(name, in_flight=0)
    next_at = dict.fromkeys(periods, told.now + seed % 7)
    settled = None
    until = told.now + 2000
    while told.now < until:
        told.tick(1)
        for name, at in next_at.items():
            if told.now >= at:
                assert told.fleet.model_engines.get(name), f"{name} was unloaded between two of its requests"
                told.used(name, after=0.0)
                next_at[name] = told.now + periods[name]
        if settled is None and told.now > until - 1500:
            settled = len(told.log)
    late = [e for _, _, effects in told.log[settled or 0 :] for e in effects]
    assert not [effect for effect in late if isinstance(effect, CreateAgent | KillAgent)]
