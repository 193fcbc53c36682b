"""The invariants of the design, over random orders of events in a world with delays and accidents."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from serve.core import events as ev
from serve.core.replay import event_to_json, fleet_to_json, replay
from serve.core.state import EngineState
from tests.support.fleets import a_kind, a_model, a_policy
from tests.unit.core.things import Process
from tests.unit.core.world import World

MODELS = (
    a_model("a", 4, aliases=("a-alias",), keep_alive=20),
    a_model("b", 4, drain_timeout=30),
    a_model("c", 2, min_residency=5, replicas_max=3, target_in_flight=1),
    a_model("d", 8, gpus=2),
    a_model("e", 6, gpus=1, keep_alive=0),
    a_model("f", 3, gpus=1, replicas_max=2, target_in_flight=2),
    a_model("g", 2, gpus=1, keep_alive=5, replicas_max=3, target_in_flight=1),
)
QUICK: dict[str, Any] = {"replica_rise_s": 1.0, "replica_fall_s": 10.0, "replica_growth_after_s": 2.0}
POLICY = a_policy(
    a_kind("cpu", 6, most=2),
    a_kind("gpu", 4, gpus=(10, 10), most=1),
    slots=4,
    servers_per_slot=3,
    waiting_max=20,
    block_idle_s=40.0,
    block_unused_s=25.0,
    last_block_idle_s=50.0,
    **QUICK,
    max_wait_s=20.0,
    load_guess_s=5.0,
)

ENDING = a_policy(
    a_kind("cpu", 6, most=3),
    a_kind("gpu", 4, gpus=(10, 10), most=2),
    slots=5,
    servers_per_slot=3,
    waiting_max=20,
    block_idle_s=40.0,
    drain_before_end_s=10.0,
    leave_before_end_s=5.0,
    load_guess_s=5.0,
    queue_wait_guess_s=5.0,
    block_start_guess_s=5.0,
    **QUICK,
)

SHRINK = bool(os.environ.get("GATEWAY_SHRINK"))
"""Look for the smallest failing story (minutes) rather than report the first."""

picks = st.integers(0, 1000)
names = st.sampled_from([model.name for model in MODELS])


class Gateway(RuleBasedStateMachine):
    world: World
    policy = POLICY
    walltimes: tuple[float | None, ...] = (None,)

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.world = World(self.policy, MODELS, seed, self.walltimes)

    # --- things that go their way ---
    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 3.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.blocks.pass_time()
        self.world.tell(ev.Tick())

    @rule(steps=st.integers(1, 12))
    def things_move_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.one_thing()
            self.world.now += 0.01

    @rule(model=names, n=st.integers(1, 3))
    def requests_come(self, model: str, n: int) -> None:
        for _ in range(n):
            self.world.request(model)

    @precondition(lambda self: self.world.requests)
    @rule(pick=picks)
    def a_request_ends(self, pick: int) -> None:
        self.world.end_request(pick % len(self.world.requests))

    @rule()
    def every_request_ends(self) -> None:
        while self.world.requests:
            self.world.end_request(0)

    @rule()
    def counters_are_asked_for(self) -> None:
        self.world.count()

    @precondition(lambda self: self.world.counts)
    @rule(pick=picks)
    def counters_arrive(self, pick: int) -> None:
        self.world.now += 0.01
        self.world.tell(self.world.counts.pop(pick % len(self.world.counts)))

    @precondition(lambda self: self.world.edge_commands)
    @rule(pick=picks)
    def the_edge_obeys(self, pick: int) -> None:
        world = self.world
        world.carry_out_at_edge(world.edge_commands.pop(pick % len(world.edge_commands)))

    @precondition(lambda self: self.world.edge_word)
    @rule(pick=picks)
    def the_edge_is_heard(self, pick: int) -> None:
        self.world.now += 0.01
        self.world.tell(self.world.edge_word.pop(pick % len(self.world.edge_word)))

    @precondition(lambda self: self.world.opening)
    @rule(pick=picks)
    def a_server_comes_up(self, pick: int) -> None:
        self.world.come_up(self.world.opening[pick % len(self.world.opening)])

    @rule(model=st.sampled_from([model.name for model in MODELS if model.replicas_max > 1]), n=st.integers(2, 7))
    def a_model_is_hot_for_a_while(self, model: str, n: int) -> None:
        for _ in range(n):
            self.world.request(model)
        self.world.seconds_pass(4, 6)

    @rule()
    def it_is_quiet_for_a_while(self) -> None:
        while self.world.requests:
            self.world.end_request(0)
        self.world.seconds_pass(12, 3)

    # --- people ---
    @precondition(lambda self: self.world.waiting)
    @rule(pick=picks)
    def a_client_leaves(self, pick: int) -> None:
        tickets = sorted(self.world.waiting)
        self.world.leave(tickets[pick % len(tickets)])

    @rule(model=names, what=st.sampled_from(["load", "unload", "pin", "unpin", "unpin"]))
    def an_administrator_speaks(self, model: str, what: str) -> None:
        said: dict[str, ev.Event] = {
            "load": ev.LoadAsked(model),
            "unload": ev.UnloadAsked(model),
            "pin": ev.PinChanged(model, True),
            "unpin": ev.PinChanged(model, False),
        }
        self.world.tell(said[what])

    @rule()
    def the_gateway_closes(self) -> None:
        self.world.tell(ev.GatewayCloses())

    @precondition(lambda self: self.world.fleet.nodes)
    @rule(pick=picks)
    def a_node_is_to_leave(self, pick: int) -> None:
        nodes = sorted(self.world.fleet.nodes)
        self.world.tell(ev.NodeDrainAsked(nodes[pick % len(nodes)]))

    # --- accidents ---
    @precondition(lambda self: self.world.processes())
    @rule(pick=picks)
    def an_engine_dies(self, pick: int) -> None:
        processes = self.world.processes()
        engine = sorted(processes)[pick % len(processes)]
        agent = next(agent for agent in self.world.agents.values() if engine in agent.processes)
        self.world.crash(agent, processes[engine])

    @precondition(lambda self: any(p.sleep in ("sleep", "wake") for p in self.world.processes().values()))
    @rule(pick=picks)
    def a_sleep_or_a_wake_goes_wrong(self, pick: int) -> None:
        found = sorted(p.id for p in self.world.processes().values() if p.sleep in ("sleep", "wake"))
        engine = found[pick % len(found)]
        agent = next(agent for agent in self.world.agents.values() if engine in agent.processes)
        self.world.crash(agent, agent.processes[engine], doubt=True)

    @precondition(lambda self: self.world.fleet.engines)
    @rule(pick=picks, moves=st.booleans())
    def an_engine_stands_still_or_moves_again(self, pick: int, moves: bool) -> None:
        engines = sorted(self.world.fleet.engines)
        engine = self.world.fleet.engines[engines[pick % len(engines)]]
        said: ev.Event = ev.EngineStalled(engine.id, 3.0, 1)
        self.world.tell(ev.EngineMoves(engine.id) if moves else said)

    @precondition(lambda self: any(agent.up for agent in self.world.agents.values()))
    @rule(pick=picks, node_alive=st.booleans())
    def an_agent_dies(self, pick: int, node_alive: bool) -> None:
        up = sorted(agent.id for agent in self.world.agents.values() if agent.up)
        self.world.lose_agent(self.world.agents[up[pick % len(up)]], node_alive)

    @precondition(lambda self: self.world.edge_commands)
    @rule(pick=picks)
    def the_edge_refuses(self, pick: int) -> None:
        world = self.world
        command = world.edge_commands.pop(pick % len(world.edge_commands))
        world.edge_word.append(ev.RouteRefused(command.engine, "no"))

    @rule()
    def a_node_cannot_be_had(self) -> None:
        world = self.world
        pending = [agent for agent in world.agents.values() if not agent.up and not agent.word and not agent.gone]
        if pending:
            del world.agents[pending[0].id]
            world.tell(ev.NodeFailed(pending[0].id, "no such partition"))

    @rule()
    def stale_word_comes(self) -> None:
        self.world.tell(ev.EngineExited("ghost-1-1", "?", False))
        self.world.tell(ev.RouteOpened("ghost-1-1"))

    @rule()
    def the_controller_is_killed(self) -> None:
        world = self.world
        before = {p.id: p for p in world.processes().values() if p.ready and self.open_for(p)}
        asleep = {p.id for p in world.processes().values() if p.sleep == "asleep"}
        world.restart()
        if all(agent.up for agent in world.agents.values()):
            for agent in list(world.agents.values()):
                world.hear(agent)
            assert world.fleet.settled
            for engine in before:
                known = world.fleet.engines[engine]
                assert known.state in (EngineState.READY, EngineState.DRAINING), "a warm engine was lost"
            for engine in asleep:
                assert world.fleet.engines[engine].state in (
                    EngineState.ASLEEP, EngineState.WAKING, EngineState.STOPPING
                ), "an engine that sleeps was lost"  # fmt: skip

    def open_for(self, process: Process) -> bool:
        return any(s.address == process.address and s.state == "ready" for s in self.world.servers.values())

    # --- the end ---
    def teardown(self) -> None:
        """Everybody gets the one answer, and the log gives the same decisions again."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.run_out(70.0)
        assert not world.waiting, f"never answered: {world.waiting}"
        assert not world.fleet.waiters
        assert all(count == 1 for count in world.answered.values())
        assert not world.edge_commands
        assert not world.fleet.closing
        lines = [json.dumps({"at": 0.0, **fleet_to_json(world.first)})]
        lines += [json.dumps({"at": at, **event_to_json(event)}) for event, at, _ in world.log]
        expected = [repr(effects) for _, _, effects in world.log]
        replayed = list(replay(lines))
        assert [repr(one.effects) for one in replayed] == expected
        assert replayed[-1].fleet.decisions == world.fleet.decisions


class EndingGateway(Gateway):
    """Blocks that last a minute or two or for ever, are cancelled, or vanish."""

    policy = ENDING
    walltimes = (60.0, 120.0, None)

    @rule()
    def the_ledger_is_read(self) -> None:
        self.world.blocks.tell()

    @precondition(lambda self: any(agent.up and agent.until is None for agent in self.world.agents.values()))
    @rule(pick=picks)
    def a_block_is_cancelled(self, pick: int) -> None:
        up = sorted(agent.id for agent in self.world.agents.values() if agent.up and agent.until is None)
        self.world.blocks.notice(self.world.agents[up[pick % len(up)]])

    @precondition(lambda self: any(agent.up for agent in self.world.agents.values()))
    @rule(pick=picks)
    def a_machine_vanishes(self, pick: int) -> None:
        up = sorted(agent.id for agent in self.world.agents.values() if agent.up)
        self.world.blocks.vanish(self.world.agents[up[pick % len(up)]])


class SleepingGateway(Gateway):
    """Models that take turns on the GPUs of one node that stays, with host memory for some of them to sleep in."""

    policy = a_policy(
        a_kind("cpu", 6, most=1), a_kind("gpu", 4, gpus=(10, 10), most=1), slots=6, servers_per_slot=3,
        waiting_max=20, block_idle_s=600.0, block_unused_s=900.0,
    )  # fmt: skip
    walltimes = (None, 300.0)

    @initialize(seed=st.integers(0, 2**16), once=st.booleans())
    def begin(self, seed: int, once: bool) -> None:
        self.world = World(replace(self.policy, sleep_once_loaded=once), MODELS, seed, self.walltimes)

    @rule(models=st.lists(st.sampled_from(["d", "e", "f", "g"]), min_size=2, max_size=4), hurry=st.booleans())
    def models_take_turns(self, models: list[str], hurry: bool) -> None:
        for model in models:
            self.world.request(model)
            if hurry:
                self.things_move_on(8)
            self.world.run_out(1.0 if hurry else 4.0)


TestGateway = Gateway.TestCase
SETTINGS = settings(
    max_examples=int(os.environ.get("GATEWAY_EXAMPLES", "100")),
    stateful_step_count=60,
    phases=(Phase.explicit, Phase.generate, Phase.shrink) if SHRINK else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
)

TestGateway.settings = SETTINGS
TestEndingGateway = EndingGateway.TestCase
TestEndingGateway.settings = SETTINGS
TestSleepingGateway = SleepingGateway.TestCase
TestSleepingGateway.settings = settings(SETTINGS, stateful_step_count=30)
