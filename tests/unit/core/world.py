"""A small world that does what the core says, with delays and accidents, and knows the truth.

It holds agents with engine processes, an edge with servers, clients with requests; it counts what is in flight itself
and checks, at every effect and at every command carried out, what must never happen. Commands to the edge are carried
out in any order; outcomes and counters arrive late. Word from one agent arrives in the order it was sent.
"""

from __future__ import annotations

import random

from gateway_plugin.catalog import Model
from serve.core import events as ev
from serve.core.effects import (
    Answer,
    CloseRoute,
    CreateAgent,
    DrainRoute,
    Effect,
    KillAgent,
    OpenRoute,
    SleepEngine,
    StartEngine,
    StopEngine,
    SyncSlots,
    WakeEngine,
)
from serve.core.learned import learned
from serve.core.policy import Policy
from serve.core.room import need_of
from serve.core.state import EngineState, Fleet, RouteState
from serve.core.step import initial, step
from tests.unit.core.blocks import Blocks
from tests.unit.core.things import Agent, Command, Process, Server
from tests.unit.core.truth import (
    SLEEP_MIB,
    check,
    check_alone,
    check_ask,
    check_bound,
    check_hand_over,
    check_memory,
    check_sleep,
    check_slots,
    check_start,
    check_stop,
)

RouteCommand = OpenRoute | DrainRoute | CloseRoute


class World:
    def __init__(
        self, policy: Policy, models: tuple[Model, ...], seed: int = 0, walltimes: tuple[float | None, ...] = (None,)
    ) -> None:
        self.policy = policy
        self.models = {model.name: model for model in models}
        self.random = random.Random(seed)
        self.now = 1000.0
        self.blocks = Blocks(self, walltimes)
        self.epoch = 0
        self.fleet: Fleet = initial(policy)
        self.first = self.fleet
        """That the present controller began with."""
        self.before = self.fleet
        """The fleet before the event that is being worked in."""
        self.agents: dict[str, Agent] = {}
        self.names: dict[str, int] = {}
        self.servers: dict[tuple[int, int], Server] = {}
        self.edge_commands: list[RouteCommand] = []
        self.opening: list[OpenRoute] = []
        """Carried out; the server's coming up has not been seen yet."""
        self.edge_word: list[ev.Event] = []
        self.counts: list[ev.EdgeSeen] = []
        """Asked for, not arrived."""
        self.waiting: dict[str, tuple[str, float]] = {}
        """Ticket -> model and deadline of a call that has no answer yet."""
        self.answered: dict[str, int] = {}
        self.tickets = 0
        self.requests: list[tuple[int, int]] = []
        """In flight, by server."""
        self.log: list[tuple[ev.Event, float, tuple[Effect, ...]]] = []
        self.restart()

    # --- the controller ---
    def tell(self, event: ev.Event) -> None:
        """One event into the core; its effects are checked and taken up."""
        self.before = self.fleet
        self.fleet, effects = step(self.fleet, event, self.now)
        self.log.append((event, self.now, effects))
        for effect in effects:
            self.take_up(effect)
        check(self)
        check_hand_over(self)
        if isinstance(event, ev.Tick) and self.fleet.settled:
            check_bound(self)

    def restart(self) -> None:
        """The controller dies: what was under way to it or from it is lost, and the next one is told what there is."""
        for command in self.edge_commands:
            if self.random.random() < 0.5:
                self.carry_out_at_edge(command)
        self.epoch += 1
        self.edge_commands, self.opening, self.edge_word, self.counts, self.log = [], [], [], [], []
        for agent in list(self.agents.values()):
            agent.word, agent.commands = [], []
        self.fleet = self.first = initial(self.policy, learned(self.fleet) if self.random.random() < 0.5 else None)
        self.blocks.forget()
        self.tell(ev.CatalogChanged(tuple(self.models.values())))
        self.tell(ev.Started(self.epoch, dict(self.names), self.found_servers(), tuple(sorted(self.agents))))
        for agent in self.agents.values():
            if agent.up:
                agent.word = [self.describe(agent)]
                if agent.until is not None:
                    agent.word.append(ev.NodeLeaves(agent.id, agent.until, "cancelled"))
        for ticket, (model, deadline) in list(self.waiting.items()):
            self.tell(ev.Acquire(ticket, model, max(0.0, deadline - self.now)))

    def take_up(self, effect: Effect) -> None:
        """Check an effect against the truth, then put it on its way."""
        match effect:
            case Answer(ticket, error):
                assert ticket in self.waiting, f"{ticket} was answered twice or never asked"
                model, deadline = self.waiting.pop(ticket)
                self.answered[ticket] = self.answered.get(ticket, 0) + 1
                if error is None:
                    self.send(model, deadline, again=True)
            case StartEngine(engine, node, model):
                assert node in self.agents
                assert engine not in self.processes()
                check_start(self, effect)
                assert self.names[model.name] == effect.slot
                self.command(self.agents[node], effect)
            case StopEngine(engine, node):
                assert node in self.agents
                assert engine in self.fleet.engines
                check_stop(self, effect)
                if (process := self.processes().get(engine)) is not None:
                    process.stopping = True
                self.command(self.agents[node], effect)
            case SleepEngine(engine, node):
                check_sleep(self, effect)
                self.command(self.agents[node], effect)
            case WakeEngine(engine, node):
                process = self.processes().get(engine)
                assert process is None or process.sleep == "asleep"
                self.command(self.agents[node], effect)
            case OpenRoute(engine, slot, server):
                assert self.fleet.engines[engine].state is EngineState.READY
                process = self.processes().get(engine)
                assert process is None or (process.ready and not process.sleep), "a route to one that is not ready"
                there = self.servers.get((slot, server))
                assert there is None or there.address == effect.address, "the server is another engine's"
                self.add_route_command(effect)
            case DrainRoute(engine):
                assert self.fleet.engines[engine].state is EngineState.DRAINING
                self.add_route_command(effect)
            case CloseRoute(engine, slot, server):
                assert (slot, server) in self.servers or self.fleet.closing[engine]
                self.add_route_command(effect)
            case SyncSlots(names, fresh):
                check_slots(self, names, fresh)
                self.names = dict(names)
            case CreateAgent(node, kind, block):
                assert block or node not in self.agents
                assert not block or node in self.agents
                if not block:
                    check_ask(self, kind)
                    self.blocks.ask(node, kind)
                self.agents.setdefault(node, Agent(node, kind))
            case KillAgent(node):
                if node in self.agents:
                    if not self.blocks.given_up(node):
                        assert not self.agents[node].processes, "a node was given back with engines on it"
                    for process in self.agents[node].processes.values():
                        self.cut(process)
                    self.blocks.end(f"block-{node}", "cancelled")
                    del self.agents[node]

    def add_route_command(self, effect: RouteCommand) -> None:
        under_way = [c.engine for c in (*self.edge_commands, *self.opening)]
        assert effect.engine not in under_way, "two route commands for one engine at a time"
        self.edge_commands.append(effect)

    # --- agents ---
    def processes(self) -> dict[str, Process]:
        return {id: process for agent in self.agents.values() for id, process in agent.processes.items()}

    def describe(self, agent: Agent) -> ev.NodeJoined:
        kind = next(kind for kind in self.policy.node_types if kind.name == agent.type)
        found = tuple(
            ev.FoundEngine(
                p.id, p.model, p.gpus, p.memory_mib, p.started, p.address, p.ready and not p.sleep,
                asleep=p.sleep == "asleep", can_sleep=p.can_sleep, sleep_mib=p.pinned_mib, kept_mib=p.kept_mib,
                under_way="" if p.sleep == "asleep" else p.sleep,
            )
            for p in agent.processes.values()
        )  # fmt: skip
        return ev.NodeJoined(
            agent.id, agent.type, f"block-{agent.id}", "10.0.0.1", kind.host_mib, kind.gpu_mib, found,
            sleep_mib=SLEEP_MIB if kind.gpu_mib else 0,
        )  # fmt: skip

    def agent_comes_up(self, agent: Agent) -> None:
        agent.up = True
        self.blocks.start(agent)
        agent.word.append(self.describe(agent))
        for process in [one for one in agent.processes.values() if one.sleep in ("sleep", "wake")]:
            self.crash(agent, process, doubt=True)  # its agent was lost meanwhile

    def command(self, agent: Agent, effect: Command) -> None:
        """What is sent to an agent that died meanwhile is lost."""
        if agent.up:
            agent.commands.append(effect)

    def obey(self, agent: Agent) -> None:
        """The agent carries out its oldest command."""
        command = agent.commands.pop(0)
        if command.epoch != self.epoch:
            return
        if isinstance(command, StopEngine):
            process = agent.processes.pop(command.engine, None)
            if process is not None:
                check_alone(agent, process.gpus)
                agent.word.append(ev.EngineExited(process.id, "stopped", True))
            return
        if not isinstance(command, StartEngine):
            self.sleep_or_wake(agent, command)
            return
        model = command.model
        need = need_of(model)
        check_alone(agent, command.gpus)
        address = f"{agent.id}:{self.epoch}.{command.engine}"
        process = Process(command.engine, model.name, command.gpus, need.mib, self.now, address)
        process.pinned_mib = command.sleep_mib
        agent.processes[process.id] = process
        self.check_memory(agent)

    def check_memory(self, agent: Agent) -> None:
        kind = next(kind for kind in self.policy.node_types if kind.name == agent.type)
        check_memory(agent, kind.gpu_mib, kind.host_mib)

    def sleep_or_wake(self, agent: Agent, command: SleepEngine | WakeEngine) -> None:
        """The agent begins; ``finish_sleep`` is the end of it."""
        process = agent.processes.get(command.engine)
        if process is None:
            return
        check_alone(agent, process.gpus, process.id)
        if isinstance(command, WakeEngine):
            assert process.sleep == "asleep"
            process.sleep = "wake"
        else:
            assert process.sleep == ""
            process.sleep = "sleep"
            process.pinned_mib = process.pinned_mib or process.most_mib
        self.check_memory(agent)

    def finish_sleep(self, agent: Agent, process: Process) -> None:
        if process.sleep == "wake":
            process.sleep = ""
            agent.word.append(ev.EngineAwake(process.id, 1.0))
        else:
            process.sleep = "asleep"
            self.pin(process)
            agent.word.append(ev.EngineAsleep(process.id, process.pinned_mib, 1.0, process.kept_mib))

    def pin(self, process: Process) -> None:
        """The weights turn out to be smaller than the memory of the GPUs."""
        if not process.slept:
            process.slept, process.pinned_mib = True, max(1, process.most_mib // 2)

    def finish_load(self, agent: Agent, process: Process) -> None:
        process.ready = True
        if process.pinned_mib:
            self.pin(process)
        load_s = self.now - process.started
        agent.word.append(
            ev.EngineReady(process.id, process.address, load_s, None, process.can_sleep, process.pinned_mib)
        )

    def crash(self, agent: Agent, process: Process, *, doubt: bool = False) -> None:
        """The process dies, and every request on it with it."""
        del agent.processes[process.id]
        self.cut(process)
        agent.word.append(ev.EngineExited(process.id, "exit code 1: boom", False, doubt=doubt))

    def cut(self, process: Process) -> None:
        for place, server in self.servers.items():
            if server.address == process.address:
                server.in_flight = 0
                self.requests = [request for request in self.requests if request != place]

    def lose_agent(self, agent: Agent, node_alive: bool) -> None:
        agent.up = False
        agent.commands = []
        agent.word.append(ev.NodeGone(agent.id, "died", node_alive))
        if not node_alive:
            self.end_processes(agent)
            self.blocks.end(agent.block, "failed")

    def end_processes(self, agent: Agent) -> None:
        for process in agent.processes.values():
            self.cut(process)
        agent.processes = {}

    def hear(self, agent: Agent) -> None:
        """The controller hears the agent's oldest word."""
        event = agent.word.pop(0)
        if isinstance(event, ev.NodeLeaves):
            self.blocks.noticed[agent.id] = event.until
        self.tell(event)
        if isinstance(event, ev.NodeGone) and agent.id not in self.fleet.nodes:
            for process in agent.processes.values():  # the block script ends what is recorded
                self.cut(process)
            self.agents.pop(agent.id, None)

    # --- the edge ---
    def found_servers(self) -> tuple[ev.FoundServer, ...]:
        up = {process.address for process in self.processes().values()}
        return tuple(
            ev.FoundServer(
                slot, index, s.address, s.address in up, s.state == "drain", s.in_flight,
                -1 if s.last < 0 else self.now - s.last,
            )
            for (slot, index), s in sorted(self.servers.items())
        )  # fmt: skip

    def carry_out_at_edge(self, command: RouteCommand) -> None:
        place = (command.slot, command.server)
        match command:
            case OpenRoute():
                there = self.servers.get(place)
                if there is None:
                    self.servers[place] = Server(command.address)
                else:
                    assert there.address == command.address, "an address was changed under requests"
                    there.state = "ready"
                self.opening.append(command)
            case DrainRoute():
                if place in self.servers:
                    self.servers[place].state = "drain"
                self.edge_word.append(ev.RouteDrained(command.engine))
            case CloseRoute():
                self.servers.pop(place, None)
                self.requests = [request for request in self.requests if request != place]
                self.edge_word.append(ev.RouteClosed(command.engine))

    def come_up(self, command: OpenRoute) -> None:
        """The server is seen UP, if its engine is there."""
        self.opening.remove(command)
        alive = any(process.address == command.address for process in self.processes().values())
        self.edge_word.append(ev.RouteOpened(command.engine) if alive else ev.RouteRefused(command.engine, "down"))

    def count(self) -> None:
        """The counters are asked for now; they arrive when they arrive."""
        up = {process.address for process in self.processes().values()}
        rows = []
        for engine in self.fleet.engines.values():
            if engine.server is None or engine.slot is None:
                continue
            server = self.servers.get((engine.slot, engine.server))
            if server is None or server.address != engine.address:
                if engine.route is not RouteState.OPENING:
                    rows.append(ev.ServerSeen(engine.id, False, 0, 0.0))
            else:
                rows.append(ev.ServerSeen(engine.id, server.address in up, server.in_flight, max(0.0, server.last)))
        self.counts.append(ev.EdgeSeen(tuple(rows), self.now))

    # --- clients ---
    def usable(self, model: str) -> tuple[int, int] | None:
        slot = self.names.get(model)
        up = {process.address: process for process in self.processes().values() if process.ready}
        able = [
            (server.in_flight, place)
            for place, server in self.servers.items()
            if place[0] == slot and server.state == "ready" and server.address in up
        ]
        if not able:
            return None
        _, place = min(able)
        assert not up[self.servers[place].address].sleep, "a request to an engine that sleeps"
        return place

    def send(self, model: str, deadline: float, again: bool) -> None:
        """A request reaches the edge: an engine, or the cold path."""
        place = self.usable(model)
        if place is not None:
            self.servers[place].in_flight += 1
            self.servers[place].last = self.now
            self.requests.append(place)
            return
        self.tickets += 1
        ticket = f"t{self.tickets}"
        self.waiting[ticket] = (model, deadline)
        unattended = self.random.random() < 0.15
        requester = ev.Requester(self.random.choice(("", "k1", "k2", "k3")))
        event = ev.Acquire(ticket, model, max(0.0, deadline - self.now), again, unattended, requester)
        self.edge_word.append(event)

    def request(self, model: str, wait_s: float = 60.0) -> None:
        self.send(model, self.now + wait_s, again=False)

    def leave(self, ticket: str) -> None:
        """A client goes away while it waits."""
        del self.waiting[ticket]
        self.edge_word = [e for e in self.edge_word if not (isinstance(e, ev.Acquire) and e.ticket == ticket)]
        self.tell(ev.WaiterLeft(ticket))

    def end_request(self, index: int) -> None:
        place = self.requests.pop(index)
        if place in self.servers:
            self.servers[place].in_flight -= 1

    def seconds_pass(self, seconds: int, steps: int) -> None:
        """Counters arrive once a second, and at most ``steps`` other things between them."""
        for _ in range(seconds):
            for _ in range(steps):
                self.one_thing()
                self.now += 0.01
            self.now += 1.0
            self.blocks.pass_time()
            self.count()
            self.tell(self.counts.pop())

    # --- everything goes well from here on ---
    def run_out(self, seconds: float) -> None:
        """No more accidents: everything under way arrives, requests end, time passes."""
        end = self.now + seconds
        while self.now < end:
            self.blocks.pass_time()
            if self.blocks.limited:
                self.blocks.tell()
            for _ in range(50):
                if not self.one_thing():
                    break
            while self.requests:
                self.end_request(0)
            self.count()
            while self.counts:
                self.tell(self.counts.pop(0))
            self.now += 0.5
            self.tell(ev.Tick())
        for _ in range(50):  # a block may end in the last tick
            if not self.one_thing():
                break

    def one_thing(self) -> bool:
        for agent in list(self.agents.values()):
            if agent.word:
                self.hear(agent)
                return True
            if not agent.up and not agent.gone:
                self.agent_comes_up(agent)
                return True
            if agent.commands:
                self.obey(agent)
                return True
            for process in agent.processes.values():
                if not process.ready:
                    self.finish_load(agent, process)
                    return True
                if process.sleep in ("sleep", "wake"):
                    self.finish_sleep(agent, process)
                    return True
        if self.edge_commands:
            self.carry_out_at_edge(self.edge_commands.pop(0))
            return True
        if self.opening:
            self.come_up(self.opening[0])
            return True
        if self.edge_word:
            self.tell(self.edge_word.pop(0))
            return True
        return False
