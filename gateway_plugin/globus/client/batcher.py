"""The client's one writer: takes prompts, sends packs, hands answers out. A mailbox and a loop; the rules are elsewhere
(``packing``, ``lanes``, ``wire``).
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from gateway_plugin.errors import AnswerTooLarge, GatewayError
from gateway_plugin.globus.client import endings
from gateway_plugin.globus.client.batches import Limits, Pace, Size, cut, due
from gateway_plugin.globus.client.lanes import Call, LaneKey, Pack, after_failure, halves, runs
from gateway_plugin.globus.client.protocol import Place, file_request, pack_request, too_many_lines, unpack
from gateway_plugin.globus.client.transport import Next, Transport

_TRANSIT_S = 5.0
"""Kept back from the function's budget, so that its own words about a deadline arrive before ours."""
_RELEASE_S = 2.0
_LANE_CALLS_SEEN = 256
"""More of a lane than one pack can hold is not looked at."""


@dataclass(frozen=True)
class _Offer:
    lane: LaneKey
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class _Outcome:
    pack: Pack
    future: Future[Any]


@dataclass(frozen=True)
class _Release:
    group: str
    done: threading.Event


@dataclass(frozen=True)
class _Stop:
    pass


_Message = _Offer | _Outcome | _Release | _Stop


class Dispatcher:
    """Between the verbs and a transport. ``offer``, ``release`` and ``close`` may be called from any thread; ``turn``
    by one, which is ``run``'s.

    A prompt's future runs from the moment its pack is sent: before, ``cancel()`` takes it out; after, it returns
    ``False``, since the task at the site goes on.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        limits: Limits | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._limits = limits or Limits()
        self._pace = pace or Pace()
        self._clock = clock
        self._mailbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._waiting: dict[LaneKey, deque[Call]] = {}
        self._numbers: dict[LaneKey, int] = {}
        self._again: list[tuple[float, Pack]] = []
        self._flying: dict[str, Pack] = {}
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self.tasks_sent = 0

    # --- any thread ---
    def offer(self, lane: LaneKey, calls: Iterable[Call]) -> None:
        """Take prompts; their futures are theirs to keep. Too late for that: cancelled."""
        self._post(_Offer(lane, tuple(calls)))

    def release(self, group: str) -> None:
        """Send nothing more of ``group``, and expect nothing more of it. Returns when that is so (in a moment)."""
        done = threading.Event()
        self._post(_Release(group, done))
        done.wait(_RELEASE_S)

    def close(self) -> None:
        """End ``run``: what was not sent is cancelled, what was is told that nobody listens any more."""
        self._post(_Stop())
        self._ended.wait(_RELEASE_S)

    def _post(self, message: _Message) -> None:
        self._mailbox.put(message)
        if self.stopped:  # only now is it known that somebody will take it: the loop, or we
            self._drain()

    @property
    def stopped(self) -> bool:
        """Whether nothing is taken any more."""
        return self._stopped.is_set()

    # --- the one thread ---
    def run(self) -> None:
        """Until ``close``."""
        wake: float | None = None
        try:
            while not self.stopped:
                try:
                    message = self._mailbox.get(timeout=None if wake is None else max(0.0, wake - self._clock()))
                except queue.Empty:
                    wake = self.turn()
                else:
                    wake = self.turn(message)
        finally:
            if not self.stopped:  # a mistake of ours: nobody shall wait for it for ever
                self._end()

    def turn(self, message: _Message | None = None) -> float | None:
        """Take in all that came, then do what is due. Returns when to look again; ``None``: when something comes."""
        now = self._clock()
        if message is not None:
            self._take(message, now)
        while not self.stopped:
            try:
                self._take(self._mailbox.get_nowait(), now)
            except queue.Empty:
                break
        self._expire(now)
        return None if self.stopped else self._send(now)

    def _take(self, message: _Message, now: float) -> None:
        match message:
            case _Offer(lane, calls):
                self._waiting.setdefault(lane, deque()).extend(calls)
            case _Outcome(pack, future):
                self._finish(pack, future, now)
            case _Release(group, done):
                self._forget(group)
                done.set()
            case _Stop():
                self._end()

    def _finish(self, pack: Pack, future: Future[Any], now: float) -> None:
        if self._flying.pop(pack.key, None) is None:
            return  # nobody waits for it any more
        try:
            answer = future.result()
        except (Exception, CancelledError) as error:  # noqa: BLE001 - the transport says what it means
            self._recover(pack, error, now)
            return
        if too_many_lines(answer) and len(pack.calls) > 1:
            self._halve(pack, now)
            return
        answers = unpack(answer, len(pack.calls))
        left_out = [number for number, found in enumerate(answers) if isinstance(found, AnswerTooLarge)]
        if len(pack.calls) == 1:
            left_out = []  # it is too large by itself
        for number, (call, found) in enumerate(zip(pack.calls, answers, strict=True)):
            if number not in left_out:
                ended = found if isinstance(found, GatewayError) else endings.read(call.read, found)
                endings.settle(call.future, ended)
        # as many as did fit will fit: so packs get smaller each time
        for first, count in runs(left_out, max(1, len(answers) - len(left_out))):
            place = replace(pack.place, start=pack.place.start + first, count=count)
            self._again.append((now, Pack(pack.lane, place, _key(place), pack.calls[first : first + count])))

    def _recover(self, pack: Pack, error: BaseException, now: float) -> None:
        failure = self._transport.failure(error)
        verdict = after_failure(failure.then, pack.attempt, len(pack.calls), pack.deadline - now)
        if verdict.action is Next.AGAIN:
            self._again.append((now + verdict.delay_s, replace(pack, attempt=pack.attempt + 1)))
        elif verdict.action is Next.SMALLER:
            self._halve(pack, now)
        else:
            for call in pack.calls:
                endings.settle(call.future, failure.error)

    def _halve(self, pack: Pack, now: float) -> None:
        first, second = halves(pack.place)
        for place, calls in ((first, pack.calls[: first.count]), (second, pack.calls[first.count :])):
            self._again.append((now, Pack(pack.lane, place, _key(place), calls)))

    def _expire(self, now: float) -> None:
        why = "it was not sent yet: " + self._held_back(now)
        for lane, calls in self._waiting.items():
            while calls and calls[0].deadline <= now:
                endings.settle(calls.popleft().future, endings.late(lane, why))
        for key, pack in list(self._flying.items()):
            if endings.end_late(pack, now):
                del self._flying[key]
        self._again = [(when, pack) for when, pack in self._again if not endings.end_late(pack, now)]

    def _held_back(self, now: float) -> str:
        """By what, for who must be told."""
        if self._full():
            return f"{len(self._flying)} packs are at the endpoint already, which takes its time"
        if self._pace.next(now) > now:
            return "the service's rate limit is reached"
        return "its time was too short"

    def _send(self, now: float) -> float | None:
        """Send what is due and what the pace permits: packs that failed first, then the lane that waits longest."""
        while self._pace.next(now) <= now and not self._full():
            pack = self._next_again(now) or self._next_pack(now)
            if pack is None:
                break
            self._launch(pack, now)
        return self._wake(now)

    def _next_again(self, now: float) -> Pack | None:
        for index, (when, pack) in enumerate(self._again):
            if when <= now:
                del self._again[index]
                return pack
        return None

    def _next_pack(self, now: float) -> Pack | None:
        while True:
            ready = [(when, lane.name, lane) for lane in self._waiting if (when := self._due(lane)) is not None]
            if not ready or min(ready)[0] > now:
                return None
            lane = min(ready)[2]
            waiting = self._waiting[lane]
            count = cut(self._sizes(lane), self._limits_of(lane))
            calls = tuple(call for call in (waiting.popleft() for _ in range(count)) if endings.begin(call.future))
            if not waiting:
                del self._waiting[lane]
            if not calls:
                continue  # all of them were cancelled
            start = self._numbers.get(lane, 0) if lane.file is None else int(calls[0].item["line"]) - lane.file.first
            self._numbers[lane] = start + len(calls)
            place = Place(lane.name, start, len(calls), lane.total)
            return Pack(lane, place, _key(place), calls)

    def _launch(self, pack: Pack, now: float) -> None:
        self._pace = self._pace.spend(now)
        self._flying[pack.key] = pack
        left = pack.deadline - now
        budget_s = left - min(_TRANSIT_S, left / 10)
        lane = pack.lane
        if lane.file is not None:
            start = lane.file.first + pack.place.start
            request = file_request(
                pack.key, budget_s, lane.wait, lane.file.path, lane.file.sha256, start, pack.place.count
            )
        else:
            request = pack_request(pack.key, budget_s, lane.wait, [call.item for call in pack.calls])
        try:
            future = self._transport.submit(lane.group, request)
        except Exception as error:  # noqa: BLE001 - the transport says what it means
            future = Future()
            future.set_exception(error)
        self.tasks_sent += 1
        future.add_done_callback(lambda done: self._mailbox.put(_Outcome(pack, done)))

    def _wake(self, now: float) -> float | None:
        ready = [when for lane in self._waiting if (when := self._due(lane)) is not None]
        ready += [when for when, _ in self._again]
        if self._full():  # an outcome will wake us
            ready = []
        allowed = self._pace.next(now)
        times = [max(when, allowed) for when in ready]
        times += [calls[0].deadline for calls in self._waiting.values() if calls]
        times += [endings.first_deadline(pack) for pack in self._flying.values()]
        times += [endings.first_deadline(pack) for _, pack in self._again]
        return min(times, default=None)

    def _full(self) -> bool:
        return len(self._flying) >= self._limits.under_way

    def _limits_of(self, lane: LaneKey) -> Limits:
        return self._limits if lane.file is None else replace(self._limits, items=self._limits.lines)

    def _sizes(self, lane: LaneKey) -> Sequence[Size]:
        seen = max(_LANE_CALLS_SEEN, self._limits_of(lane).items + 1)
        return [call.size for call in islice(self._waiting[lane], seen)]

    def _due(self, lane: LaneKey) -> float | None:
        return due(self._sizes(lane), self._limits_of(lane))

    def _forget(self, group: str) -> None:
        for lane in [lane for lane in self._waiting if lane.group == group]:
            for call in self._waiting.pop(lane):
                endings.withdraw(call.future)
        for lane in [lane for lane in self._numbers if lane.group == group]:
            del self._numbers[lane]
        for pack in [pack for pack in self._flying.values() if pack.lane.group == group]:
            del self._flying[pack.key]
            endings.close(pack)
        for _, pack in [entry for entry in self._again if entry[1].lane.group == group]:
            endings.close(pack)
        self._again = [entry for entry in self._again if entry[1].lane.group != group]
        self._transport.release(group)

    def _end(self) -> None:
        self._stopped.set()
        groups = {lane.group for lane in self._waiting} | {pack.lane.group for pack in self._flying.values()}
        for group in groups | {pack.lane.group for _, pack in self._again}:
            self._forget(group)
        self._drain()
        self._transport.close()
        self._ended.set()

    def _drain(self) -> None:
        """What came too late: any thread may see to it, and each message is taken by one."""
        while True:
            try:
                message = self._mailbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Offer):
                for call in message.calls:
                    endings.withdraw(call.future)
            elif isinstance(message, _Release):
                message.done.set()


def _key(place: Place) -> str:
    return place.key(uuid.uuid4().hex[:12])
