"""Between the client's calls and Globus Compute: takes requests, sends batches, ends the requests' futures. One thread
calls it; the decisions are in ``batches`` and ``protocol``.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from itertools import islice
from typing import Any

from gateway_plugin.api_types import understood
from gateway_plugin.errors import AnswerTooLarge, GatewayError
from gateway_plugin.globus.client.batches import (
    Batch,
    BatchKey,
    Call,
    Limits,
    Pace,
    Size,
    after_failure,
    cut,
    due,
    runs,
)
from gateway_plugin.globus.client.futures import abandon, begin, end_late, past_deadline, settle, withdraw
from gateway_plugin.globus.client.protocol import Span, task_request, too_many_lines, unpack
from gateway_plugin.globus.client.transport import Next, Transport

_TRANSIT_S = 5.0
"""Subtracted from the function's time limit, so that its own error at a deadline arrives before ours."""
_CALLS_SEEN = 256
"""Of the requests that wait under one key; more than a batch can hold is not looked at."""


class Batcher:
    """A request's future runs from the moment its batch is sent: before, ``cancel()`` takes it out; after, it returns
    ``False``, since the task at the site goes on.

    ``done(batch, future)`` is called when a task has ended, by any thread: to call ``finish`` with.
    """

    def __init__(
        self,
        transport: Transport,
        done: Callable[[Batch, Future[Any]], None],
        limits: Limits | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._transport = transport
        self._done = done
        self._limits = limits or Limits()
        self._pace = pace or Pace()
        self._waiting: dict[BatchKey, deque[Call]] = {}
        self._numbers: dict[BatchKey, int] = {}
        self._again: list[tuple[float, Batch]] = []
        self._in_flight: dict[str, Batch] = {}
        self.tasks_sent = 0

    def offer(self, key: BatchKey, calls: Iterable[Call]) -> None:
        """Take requests."""
        self._waiting.setdefault(key, deque()).extend(calls)

    def turn(self, now: float) -> float | None:
        """Do what is due. Returns when to call again; ``None``: when there is something new."""
        self._expire(now)
        while self._pace.next(now) <= now and not self._full():
            batch = self._next_again(now) or self._next_batch(now)  # batches that failed first
            if batch is None:
                break
            self._launch(batch, now)
        return self._wake(now)

    def finish(self, batch: Batch, future: Future[Any], now: float) -> None:
        """A task has ended: end its requests, or send them again."""
        if self._in_flight.pop(batch.key, None) is None:
            return  # all of its requests have ended
        try:
            answer = future.result()
        except (Exception, CancelledError) as error:  # noqa: BLE001 - the transport says what it means
            self._recover(batch, error, now)
            return
        if too_many_lines(answer) and len(batch.calls) > 1:
            self._halve(batch, now)
            return
        answers = unpack(answer, len(batch.calls))
        left_out = [number for number, found in enumerate(answers) if isinstance(found, AnswerTooLarge)]
        if len(batch.calls) == 1:
            left_out = []  # it is too large by itself
        for number, (call, found) in enumerate(zip(batch.calls, answers, strict=True)):
            if number not in left_out:
                settle(call.future, found if isinstance(found, GatewayError) else understood(call.read, found))
        # as many as did fit will fit: so batches get smaller each time
        for first, count in runs(left_out, max(1, len(answers) - len(left_out))):
            self._split_off(batch, first, count, now)

    def _recover(self, batch: Batch, error: BaseException, now: float) -> None:
        failure = self._transport.failure(error)
        action, delay_s = after_failure(failure.then, batch.attempt, len(batch.calls), batch.deadline - now)
        if action is Next.AGAIN:
            self._again.append((now + delay_s, replace(batch, attempt=batch.attempt + 1)))
        elif action is Next.SMALLER:
            self._halve(batch, now)
        else:
            for call in batch.calls:
                settle(call.future, failure.error)

    def _halve(self, batch: Batch, now: float) -> None:
        half, count = len(batch.calls) // 2, len(batch.calls)
        self._split_off(batch, 0, half, now)
        self._split_off(batch, half, count - half, now)

    def _split_off(self, batch: Batch, first: int, count: int, now: float) -> None:
        """Send a part of ``batch`` again, as a batch of its own."""
        self._again.append((now, _batch(batch.of, batch.span.part(first, count), batch.calls[first : first + count])))

    def _expire(self, now: float) -> None:
        why = "it was not sent yet: " + self._held_back(now)
        for key, calls in self._waiting.items():
            while calls and calls[0].deadline <= now:
                settle(calls.popleft().future, past_deadline(key, why))
        self._in_flight = {name: batch for name, batch in self._in_flight.items() if not end_late(batch, now)}
        self._again = [(when, batch) for when, batch in self._again if not end_late(batch, now)]

    def _held_back(self, now: float) -> str:
        """Why requests wait here, for the error at their deadline."""
        if self._full():
            return f"{len(self._in_flight)} batches are at the endpoint already, which takes its time"
        if self._pace.next(now) > now:
            return "the service's rate limit is reached"
        return "its time was too short"

    def _next_again(self, now: float) -> Batch | None:
        for index, (when, batch) in enumerate(self._again):
            if when <= now:
                del self._again[index]
                return batch
        return None

    def _next_batch(self, now: float) -> Batch | None:
        while True:
            ready = [(when, key.name, key) for key in self._waiting if (when := self._due(key)) is not None]
            if not ready or min(ready)[0] > now:
                return None
            key = min(ready)[2]
            waiting = self._waiting[key]
            count = cut(self._sizes(key), self._limits_of(key))
            calls = tuple(call for call in (waiting.popleft() for _ in range(count)) if begin(call.future))
            if not waiting:
                del self._waiting[key]
            if not calls:
                continue  # all of them were cancelled
            start = self._numbers.get(key, 0) if key.file is None else int(calls[0].item["line"]) - key.file.first
            self._numbers[key] = start + len(calls)
            return _batch(key, Span(key.name, start, len(calls), key.total), calls)

    def _launch(self, batch: Batch, now: float) -> None:
        self._pace = self._pace.spend(now)
        self._in_flight[batch.key] = batch
        left_s, of = batch.deadline - now, batch.of
        limit_s = left_s - min(_TRANSIT_S, left_s / 10)
        content: dict[str, Any] = {"items": [call.item for call in batch.calls]}
        if of.file is not None:
            start, count = of.file.first + batch.span.start, batch.span.count
            content = {"input": {"path": of.file.path, "sha256": of.file.sha256, "start": start, "count": count}}
        request = task_request(batch.key, limit_s, of.wait, **content)
        try:
            future = self._transport.submit(of.group, request)
        except Exception as error:  # noqa: BLE001 - the transport says what it means
            future = Future()
            future.set_exception(error)
        self.tasks_sent += 1
        future.add_done_callback(lambda ended: self._done(batch, ended))

    def _wake(self, now: float) -> float | None:
        ready = [when for key in self._waiting if (when := self._due(key)) is not None]
        ready += [when for when, _ in self._again]
        if self._full():  # an outcome will wake us
            ready = []
        allowed = self._pace.next(now)
        times = [max(when, allowed) for when in ready]
        times += [calls[0].deadline for calls in self._waiting.values() if calls]
        times += [batch.next_deadline for batch in self._sent()]
        return min(times, default=None)

    def _sent(self) -> list[Batch]:
        """In flight, or to be sent again."""
        return [*self._in_flight.values(), *(batch for _, batch in self._again)]

    def _full(self) -> bool:
        return len(self._in_flight) >= self._limits.under_way

    def _limits_of(self, key: BatchKey) -> Limits:
        return self._limits if key.file is None else replace(self._limits, items=self._limits.lines)

    def _sizes(self, key: BatchKey) -> Sequence[Size]:
        seen = max(_CALLS_SEEN, self._limits_of(key).items + 1)
        return [call.size for call in islice(self._waiting[key], seen)]

    def _due(self, key: BatchKey) -> float | None:
        return due(self._sizes(key), self._limits_of(key))

    def forget(self, group: str) -> None:
        """Send nothing more of ``group``, and expect nothing more of it."""
        for key in [key for key in self._waiting if key.group == group]:
            for call in self._waiting.pop(key):
                withdraw(call.future)
        self._numbers = {key: count for key, count in self._numbers.items() if key.group != group}
        for batch in self._sent():
            if batch.of.group == group:
                abandon(batch)
        self._in_flight = {name: batch for name, batch in self._in_flight.items() if batch.of.group != group}
        self._again = [entry for entry in self._again if entry[1].of.group != group]
        self._transport.release(group)

    def end(self) -> None:
        """What was not sent is cancelled, what was sent ends with ``EndpointUnavailable``."""
        for group in {key.group for key in self._waiting} | {batch.of.group for batch in self._sent()}:
            self.forget(group)
        self._transport.close()


def _batch(key: BatchKey, span: Span, calls: tuple[Call, ...]) -> Batch:
    return Batch(key, span, span.key(uuid.uuid4().hex[:12]), calls)
