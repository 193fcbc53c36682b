"""A model with one engine, an edge and an ingress in virtual time: the core decides on engines, ``Trials`` on requests.

It plays what stands between them: requests that the edge gives to the engine by itself, engines that die under poison,
loads that take time. ``old`` plays another rule: after two deaths with a request on board it is refused.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from gateway_plugin.errors import GatewayError
from serve.core import events as ev
from serve.core.effects import Answer, CloseRoute, OpenRoute, StartEngine, SyncSlots
from serve.core.state import EngineState
from serve.ingress.boarding import KEEP_S
from serve.ingress.trials import Trials
from tests.support.fleets import Story, a_model, begin

LOAD_S = 2.0
HANG_AFTER_S = 300.0


@dataclass
class Request:
    number: int
    body: str
    lasts_s: float
    kills: bool = False
    """The engine dies when ``lasts_s`` are over."""
    came: float = 0.0
    sent: float | None = None
    """It is on the engine since then."""
    apart: bool = False
    death: float | None = None
    """Of an engine that had it, not told to the trials yet."""
    seated: bool = False
    deaths: int = 0
    result: str = ""
    ended: float = 0.0


class Gateway:
    def __init__(self, *, old: bool = False, load_s: float = LOAD_S) -> None:
        self.old = old
        self.load_s = load_s
        self.story: Story = begin(a_model("m", hang_after=HANG_AFTER_S))
        self.now = self.story.now
        self.trials = Trials(HANG_AFTER_S)
        self.requests: list[Request] = []
        self.apart = False
        self.deaths: list[float] = []
        self.kills: Counter[str] = Counter()
        self._work: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: dict[str, Request] = {}
        self._told = 0.0
        """When the ingress last said that it has suspects."""

    # --- time ---
    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._work, (when, next(self._order), do))

    def run(self, seconds: float) -> None:
        """Everything that happens within this time; the core hears every quarter of a second that time passes."""
        end = self.now + seconds
        tick = self.now
        while tick < end and (self._work or any(not request.result for request in self.requests)):
            tick += 0.25
            while self._work and self._work[0][0] <= tick:
                self.now, _, do = heapq.heappop(self._work)
                do()
            self.now = max(self.now, tick)
            if self.now >= self._told + KEEP_S and self.trials.remembers(self.now):
                self._told = self.now
                self.tell(ev.SuspectsKept("m"))
            self.tell(ev.Tick())
            self.pump()

    def tell(self, event: ev.Event) -> None:
        self.story.now = self.now
        for effect in self.story.on(event):
            match effect:
                case StartEngine(engine):
                    ready = ev.EngineReady(engine, f"10.0.0.1:{engine}", self.load_s)
                    self.at(self.now + self.load_s, lambda ready=ready: self.tell(ready))  # type: ignore[misc]
                case OpenRoute(engine):
                    self.at(self.now + 0.01, lambda engine=engine: self.tell(ev.RouteOpened(engine)))  # type: ignore[misc]
                case CloseRoute(engine):
                    self.at(self.now, lambda engine=engine: self.tell(ev.RouteClosed(engine)))  # type: ignore[misc]
                case SyncSlots():
                    self.apart = "m" in effect.apart and not self.old
                case Answer(ticket, error):
                    self.at(self.now, lambda t=ticket, e=error: self.granted(t, e))  # type: ignore[misc]

    def serves(self) -> bool:
        engines = self.story.fleet.engines.values()
        return any(engine.state is EngineState.READY and engine.up for engine in engines)

    # --- requests ---
    def ask(self, body: str, lasts_s: float, after: float = 0.0, *, kills: bool = False) -> Request:
        request = Request(len(self.requests), body, lasts_s, kills, self.now + after)
        self.requests.append(request)
        self.at(request.came, lambda: self.come(request))
        return request

    def come(self, request: Request) -> None:
        """At the front door: to the engine if it is there and no trials go on, else to the ingress."""
        if self.serves() and not self.apart:
            self.board(request)
        else:
            self.acquire(request)

    def acquire(self, request: Request) -> None:
        self._waiting[ticket := f"{request.number}-{next(self._order)}"] = request
        self.tell(ev.Acquire(ticket, "m", 1800.0))

    def granted(self, ticket: str, error: GatewayError | None) -> None:
        request = self._waiting.pop(ticket)
        if error is not None:
            self.end(request, error.code)
        elif not self.serves():
            self.acquire(request)
        elif self.old:
            self.board(request) if request.deaths < 2 else self.end(request, "request_killed_engine")
        else:
            self.seat(request)

    def seat(self, request: Request) -> None:
        if not request.seated:
            request.seated = True
            self.trials.come(request.number, request.body, self.now)
        if request.death is not None:
            self.trials.died(request.number, request.death, self.now, apart=request.apart)
            request.death = None
        if self.trials.under_way(request.number):
            self.board(request)
        self.pump()

    def pump(self) -> None:
        for number in self.trials.admit(self.now):
            request = self.requests[number]
            if self.trials.guilty(number):
                self.end(request, "request_killed_engine")
            elif self.trials.worn_out(number):
                self.end(request, "engine_died_often")
            else:
                self.board(request)
        at = self.trials.next_at(self.now)
        if at is not None and not any(when <= at for when, _, _ in self._work):
            self.at(at, self.pump)

    def board(self, request: Request) -> None:
        if not self.serves():  # the edge has no usable server: not routed, and no engine had it
            if request.seated:
                self.trials.came_back(request.number, self.now)
            self.acquire(request)
            return
        kept_apart = self.story.fleet.apart.get("m")
        request.sent, request.apart = self.now, kept_apart is not None and kept_apart.since < self.now - 1
        sent = request.sent
        if request.seated:
            self.trials.goes(request.number)

        def over() -> None:
            if request.sent != sent:
                return
            self.die(request) if request.kills else self.answer(request)

        self.at(self.now + request.lasts_s, over)

    def answer(self, request: Request) -> None:
        if request.seated and self.trials.answered(request.number, self.now):
            self.tell(ev.ModelAnswered("m"))
        request.seated = False
        self.end(request, "answered")
        self.pump()

    def end(self, request: Request, result: str) -> None:
        assert not request.result
        request.result, request.sent, request.ended = result, None, self.now
        if request.seated:
            self.trials.left(request.number, self.now)

    def die(self, killer: Request) -> None:
        self.kills[killer.body] += 1
        on_board = [request for request in self.requests if request.sent is not None]
        self.deaths.append(self.now)
        engine = next(iter(self.story.fleet.engines.values()))
        self.tell(ev.EngineExited(engine.id, "signal 9", False))
        for request in on_board:
            request.sent, request.death, request.deaths = None, self.now, request.deaths + 1
            if request.seated:
                self.trials.came_back(request.number, self.now)
            self.acquire(request)

    # --- what became of it ---
    def results(self, *, kills: bool = False) -> Counter[str]:
        return Counter(request.result for request in self.requests if request.kills is kills)

    def longest_s(self) -> float:
        return max(request.ended - request.came for request in self.requests if not request.kills)
