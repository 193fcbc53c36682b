"""When a request may be sent to its model's engines, and the outcome of requests whose engines died.

The shell around ``serve.ingress.trials``: it reads the clock, keeps requests waiting, and asks the controller when
engines died. While there are suspects it reports them to the controller repeatedly, and the edge sends all requests of
their model to the ingress.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Coroutine
from typing import Any

from gateway_plugin.errors import EngineDiedOften, RequestKilledEngine, WaitDeadline
from serve.core.policy import APART_S
from serve.ingress.trials import ALONE_MAX, DEATHS_MAX, Trials
from serve.ingress.waiting import DEATH_NEWS_S, History, Waiting

log = logging.getLogger("gateway.ingress")

KEEP_S = APART_S / 4
"""Interval of reports of suspects to the controller."""


class Boarding:
    """The trials of all models, and the requests that wait in them."""

    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting
        self._trials: dict[str, Trials] = {}
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._timers: dict[Trials, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept_apart: set[str] = set()

    def seat(self, history: History, path: str, body: bytes) -> Seat:
        """A place for a request. Names of one entry of the catalog share engines and trials."""
        trials = self._trials.setdefault(history.name, Trials())
        if history.hang_after_s is not None:
            trials.hang_after_s = history.hang_after_s
        return Seat(self, trials, history.name, next(self._numbers), _digest(path, body))

    async def refuse_known(self, model: str, path: str, body: bytes) -> None:
        """For a request without a seat: if it would be refused, no engine need be loaded, and none evicted.

        Raises ``RequestKilledEngine`` or ``EngineDiedOften``, as ``Seat.turn``.
        """
        now = time.monotonic()
        if not any(trials.remembers(now) for trials in self._trials.values()):
            return
        digest = _digest(path, body)
        if any(trials.refuses(digest, now) for trials in self._trials.values()):
            history = await self.waiting.history(model)  # the catalog entry of this name
            trials = self._trials.get(history.name)
            if trials is not None and trials.refuses(digest, now):
                seat = self.seat(history, path, body)
                try:
                    seat.refuse()
                finally:
                    seat.leave()

    async def wait(self, trials: Trials, ticket: int, deadline: float) -> bool:
        """Wait for its turn (``True``), or until it is known to be refused; ``False``: no turn before ``deadline``."""
        if trials.under_way(ticket):
            return True
        called = self._calls[ticket] = asyncio.get_running_loop().create_future()
        self.pump(trials)
        try:
            await asyncio.wait_for(called, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return False
        finally:
            del self._calls[ticket]
        return True

    def pump(self, trials: Trials) -> None:
        """Admit the requests whose turn it is, and schedule the next check."""
        now = time.monotonic()
        for ticket in trials.admit(now):
            if ticket in self._calls and not self._calls[ticket].done():
                self._calls[ticket].set_result(None)
        timer = self._timers.pop(trials, None)
        if timer is not None:
            timer.cancel()
        next_at = trials.next_at(now)
        if next_at is not None:
            self._timers[trials] = asyncio.get_running_loop().call_later(next_at - now, self.pump, trials)

    def keep_apart(self, trials: Trials, model: str) -> None:
        """Have all requests of ``model`` sent here while ``trials`` has suspects or culprits."""
        if model not in self._kept_apart:
            self._kept_apart.add(model)
            self.keep(self._keep_apart(trials, model))

    async def _keep_apart(self, trials: Trials, model: str) -> None:
        try:
            while trials.remembers(time.monotonic()):
                await self.waiting.tell("suspects", model)
                await asyncio.sleep(KEEP_S)
        finally:
            self._kept_apart.discard(model)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` although its request is over."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _digest(path: str, body: bytes) -> str:
    return hashlib.sha256(path.encode() + b"\0" + body).hexdigest()


class Seat:
    """One request's place among those of its model."""

    def __init__(self, boarding: Boarding, trials: Trials, model: str, ticket: int, digest: str) -> None:
        self._boarding = boarding
        self._trials = trials
        self._model = model
        self._ticket = ticket
        self._sent_at = 0.0
        """Wall-clock seconds, as those of deaths."""
        self._over = False
        trials.come(ticket, digest, time.monotonic())

    async def turn(self, deadline: float) -> None:
        """Wait until it may be sent (``deadline``: monotonic seconds).

        Raises:
            RequestKilledEngine, EngineDiedOften: as ``refuse``.
            WaitDeadline: other requests were tried, or none could be tried, all the time.
        """
        called = await self._boarding.wait(self._trials, self._ticket, deadline)
        self.refuse()
        if not called:
            raise WaitDeadline(
                f"An engine of '{self._model}' died, and the requests that it had are being tried one after the other; "
                "it was not this one's turn within the time that it may wait. Try again.",
                retry_after_s=5.0,
                state="waiting",
            )
        self._trials.goes(self._ticket)
        self._sent_at = time.time()

    def refuse(self) -> None:
        """Raise the error of a request that is not sent any more.

        Raises:
            RequestKilledEngine: (1) engines died with this request alone.
            EngineDiedOften: (2) too many died with it among others.
        """
        if self._trials.guilty(self._ticket):  # (1)
            raise RequestKilledEngine(
                f"{ALONE_MAX} engines of '{self._model}' died while they worked on this request and on nothing else; "
                "it is not given to another for a while. Change the request before you send it again."
            )
        if self._trials.worn_out(self._ticket):  # (2)
            raise EngineDiedOften(
                f"{DEATHS_MAX} engines of '{self._model}' died while they had this request among others; whether it is "
                "the cause is not known. Try again later; if it goes on, see 'gateway status'.",
                retry_after_s=60.0,
                state="failed",
            )

    def came_back(self) -> None:
        """It reached no engine, or its engine broke off before the first byte."""
        self._trials.came_back(self._ticket, time.monotonic())

    def blame(self, history: History, span: tuple[float, float]) -> bool:
        """Whether an engine died in ``span``, wall-clock seconds, during which an engine had the request."""
        death = history.died_in(span)
        if death is None:
            return False
        apart = history.apart_from(self._sent_at)
        self._trials.died(self._ticket, death, time.monotonic(), apart=apart)
        self._boarding.keep_apart(self._trials, self._model)
        log.warning("engine-died-under-request", extra={"model": self._model, "apart": apart})
        return True

    def answered(self) -> None:
        """The whole answer was sent to the client."""
        if not self._over:
            self._over = True
            if self._trials.answered(self._ticket, time.monotonic()):
                self._boarding.keep(self._boarding.waiting.tell("answered", self._model))
            self._boarding.pump(self._trials)

    def broke_off(self) -> None:
        """The engine broke off within the answer: if it died, this is remembered for the client's next try."""
        if not self._over:
            self._over = True
            self._boarding.keep(self._account(time.time()))

    async def _account(self, at: float) -> None:
        await asyncio.sleep(DEATH_NEWS_S)
        history = await self._boarding.waiting.history(self._model)
        self.blame(history, (self._sent_at, at + DEATH_NEWS_S))
        self._leave()

    def leave(self) -> None:
        """End it, unless it has ended otherwise."""
        if not self._over:
            self._over = True
            self._leave()

    def _leave(self) -> None:
        self._trials.left(self._ticket, time.monotonic())
        self._boarding.pump(self._trials)
