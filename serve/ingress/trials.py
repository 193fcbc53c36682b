"""Which requests of one model may be sent to its engines now, and which of them kill engines. No clock, no I/O.

An engine that dies makes suspects of all requests that it had. Suspects are tried apart from newcomers:

- the first time in cohorts of the square root of their number; after a death in a cohort one by one;
- a request that was alone on ``ALONE_MAX`` dying engines is guilty, and so is every request with the same body for
  ``MEMORY_S`` after that; a suspect that is answered is one no more, one that left is forgotten after ``SUSPECT_S``;
- a trial begins when nothing else is under way. For that newcomers are held back for ``QUIET_S``; after that those held
back go together, and if that was too short for the answers under way the next ones are held twice as long;
- during a trial they are held back for at most ``Trials.exclusive_s``; after a death, and after ``TURN_S`` of trials,
  it is the newcomers' turn: for as long as that of the suspects was, at least ``OPEN_S``.

So a request that kills within ``Trials.exclusive_s`` kills at most ``KILLS_MAX`` engines: among others, in a cohort,
and twice alone. One that kills later is given up after ``DEATHS_MAX``, without being called guilty.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

ALONE_MAX = 2
KILLS_MAX = 2 + ALONE_MAX
DEATHS_MAX = 8
MEMORY_S = 300.0
SUSPECT_S = 60.0
"""A client that saw its request fail sends it again within this time, most likely."""
SAME_DEATH_S = 0.01
"""Deaths whose times differ by less are one: wall-clock times jitter while that clock is set (``SteadyClock``)."""
RECORDS_MAX = 512
"""Suspected and guilty bodies kept for one model."""

OPEN_S = 2.0
QUIET_S = 15.0
TURN_S = 10.0
EXCLUSIVE_S = 90.0
EXCLUSIVE_MAX_S = 630.0
"""Where engines may hang for hours, others do not wait for that: such a suspect is given up after ``DEATHS_MAX``."""
HANG_NEWS_S = 30.0
"""Within this time after ``hang_after_s`` a hanging engine is detected and ended: that must fall into the trial."""


@dataclass
class _Record:
    """The record of one body."""

    deaths: int = 0
    alone: int = 0
    last_death: float = -math.inf
    until: float = 0.0

    @property
    def guilty(self) -> bool:
        return self.alone >= ALONE_MAX

    @property
    def worn_out(self) -> bool:
        return self.deaths >= DEATHS_MAX


@dataclass
class _Request:
    digest: str
    alone: bool = True
    """Nothing else was under way while an engine may have had it."""
    back_at: float | None = None
    """It is under way, but no engine has it any more, since then."""


class Trials:
    """The requests of one model. Times are seconds of one clock, given by the caller; tickets name requests."""

    def __init__(self, hang_after_s: float = 0.0) -> None:
        self.hang_after_s = hang_after_s
        """A hanging engine of the model is ended after this time; 0: never."""
        self._requests: dict[int, _Request] = {}
        self._waiting: dict[int, None] = {}
        """In the order of arrival; all others are under way."""
        self._under_way: set[int] = set()
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._exclusive_until: float | None = None
        """During a trial."""
        self._open_until = -math.inf
        """Until then it is the newcomers' turn."""
        self._kept = False
        """The turn lasts although no newcomer is here: some were held back."""
        self._hold_s = QUIET_S
        self._turn_began: float | None = None
        """Of the suspects."""
        self._unproved = False
        """An engine died and no request was answered since."""

    @property
    def exclusive_s(self) -> float:
        """How long a trial holds others back: long enough for a hanging engine to be detected."""
        return min(max(EXCLUSIVE_S, self.hang_after_s + HANG_NEWS_S), EXCLUSIVE_MAX_S)

    # --- events of a request ---
    def come(self, ticket: int, digest: str, now: float) -> None:
        """A request has arrived and waits for its turn."""
        self._forget(now)
        self._requests[ticket] = _Request(digest)
        self._waiting[ticket] = None

    def came_back(self, ticket: int, now: float) -> None:
        """No engine has it any more. Whether one died is known only after the next load, which may take long."""
        self._requests[ticket].back_at = now

    def goes(self, ticket: int) -> None:
        """It is sent, for the first time or again."""
        request = self._requests[ticket]
        if request.back_at is not None:
            request.alone = self._under_way == {ticket}
            request.back_at = None

    def died(self, ticket: int, death: float, now: float, *, apart: bool) -> None:
        """An engine that had the request died at ``death``; it waits for its turn again.

        ``apart``: every request that this engine had came through here, so that "alone" means alone.
        """
        request = self._requests[ticket]
        record = self._records.setdefault(request.digest, _Record())
        if death > record.last_death + SAME_DEATH_S:  # not once more for another request with the same body
            record.deaths += 1
            record.alone += ticket in self._under_way and request.alone and apart
            record.last_death = death
        record.until = now + (MEMORY_S if self.refused(ticket) else SUSPECT_S)
        self._records.move_to_end(request.digest)
        while len(self._records) > RECORDS_MAX:
            self._records.popitem(last=False)
        self._under_way.discard(ticket)
        self._waiting[ticket] = None
        self._unproved = True
        self._open_until = max(self._open_until, now + OPEN_S)
        self._end_trial_if_over(now, request.back_at)

    def answered(self, ticket: int, now: float) -> bool:
        """It was answered completely: it is no suspect. Returns whether it is the first since an engine died."""
        digest = self._requests[ticket].digest
        if digest in self._records and not self.guilty(ticket):
            del self._records[digest]
        first, self._unproved = self._unproved, False
        self.left(ticket, now)
        return first

    def left(self, ticket: int, now: float) -> None:
        """It has left, with any outcome."""
        if ticket in self._requests and self.suspect(ticket) and not self.refused(ticket):
            record = self._records[self._requests[ticket].digest]
            record.until = max(record.until, now + SUSPECT_S)
        self._requests.pop(ticket, None)
        self._waiting.pop(ticket, None)
        self._under_way.discard(ticket)
        self._end_trial_if_over(now)

    # --- queries ---
    def suspect(self, ticket: int) -> bool:
        """An engine died that had it, or another request with the same body."""
        return self._requests[ticket].digest in self._records

    def remembers(self, now: float) -> bool:
        """Whether there are suspects here, or known ones that may come again."""
        self._forget(now)
        return bool(self._records)

    def refuses(self, digest: str, now: float) -> bool:
        """Whether a request with this body would not be sent."""
        self._forget(now)
        record = self._records.get(digest)
        return record is not None and (record.guilty or record.worn_out)

    def under_way(self, ticket: int) -> bool:
        """It was admitted, and no engine died under it since."""
        return ticket in self._under_way

    def refused(self, ticket: int) -> bool:
        """It is not sent any more."""
        return self.guilty(ticket) or self.worn_out(ticket)

    def guilty(self, ticket: int) -> bool:
        """It, or another request with the same body, was alone on ``ALONE_MAX`` dying engines."""
        record = self._records.get(self._requests[ticket].digest)
        return record is not None and record.guilty

    def worn_out(self, ticket: int) -> bool:
        """So many engines died with it that it is given up, though it was not shown to be the cause."""
        record = self._records.get(self._requests[ticket].digest)
        return record is not None and record.worn_out

    # --- turns ---
    def admit(self, now: float) -> tuple[int, ...]:
        """Requests that are under way from now on, and those that are refused without waiting.

        (1) without suspects all go; (2) a trial holds others back for a while; (3) newcomers have their turn;
        (4) nothing is under way: a trial; (5) wait for that; (6) too long: those that are held back go.
        """
        refused = tuple(ticket for ticket in self._waiting if self.refused(ticket))
        suspects = [ticket for ticket in self._waiting if self.suspect(ticket) and not self.refused(ticket)]
        newcomers = [ticket for ticket in self._waiting if not self.suspect(ticket)]
        if self._exclusive_until is not None:
            if now < self._exclusive_until:  # (2)
                return refused
            self._exclusive_until = None
            self._turn_newcomers(now, self._last_back())
        busy = bool(self._under_way)
        if not suspects:  # (1)
            self._hold_s, self._kept = QUIET_S, False
            return refused + self._send(newcomers)
        if now < self._open_until and (newcomers or busy or self._kept):  # (3)
            return refused + self._send(newcomers)
        if not busy:  # (4)
            self._turn_began = now if self._turn_began is None else self._turn_began
            self._kept = False
            self._exclusive_until = now + self.exclusive_s
            return refused + self._send(self._cohort(suspects))
        if not newcomers or now < self._open_until + self._hold_s:  # (5)
            return refused
        self._open_until, self._hold_s = now, min(2 * self._hold_s, self.exclusive_s)  # (6)
        return refused + self._send(newcomers)

    def next_at(self, now: float) -> float | None:
        """When ``admit`` is due again without an event."""
        if not self._waiting:
            return None
        ends = [self._open_until, self._open_until + self._hold_s]
        if self._exclusive_until is not None:
            ends = [self._exclusive_until]
        return min((at for at in ends if at > now), default=None)

    def _cohort(self, suspects: list[int]) -> list[int]:
        """Suspects to try next: one that more than one engine died under; else the square root of their number."""
        again = [ticket for ticket in suspects if self._records[self._requests[ticket].digest].deaths > 1]
        return again[:1] or suspects[: math.ceil(math.sqrt(len(suspects)))]

    def _send(self, tickets: list[int]) -> tuple[int, ...]:
        for ticket in tickets:
            if len(self._under_way) == 1:
                other = self._requests[next(iter(self._under_way))]
                other.alone = other.alone and other.back_at is not None
            self._requests[ticket].alone = not self._under_way
            self._requests[ticket].back_at = None
            del self._waiting[ticket]
            self._under_way.add(ticket)
        return tuple(tickets)

    def _end_trial_if_over(self, now: float, back_at: float | None = None) -> None:
        """A trial ends with its last request, a turn with a death or after enough trials."""
        if self._exclusive_until is None or self._under_way:
            return
        self._exclusive_until = None
        if now < self._open_until or (self._turn_began is not None and now >= self._turn_began + TURN_S):
            self._turn_newcomers(now, back_at)

    def _turn_newcomers(self, now: float, back_at: float | None) -> None:
        """Begin the newcomers' turn. ``back_at``: the suspects' turn ended then; none could be served since."""
        ended = now if back_at is None else back_at
        lasted_s = ended - self._turn_began if self._turn_began is not None else 0.0
        self._turn_began = None
        self._open_until = max(self._open_until, now + max(OPEN_S, lasted_s))
        self._kept = any(not self.suspect(ticket) for ticket in self._waiting)

    def _last_back(self) -> float | None:
        """When the last request that is under way came back; ``None``: one is still on an engine."""
        backs = [self._requests[ticket].back_at for ticket in self._under_way]
        return max((at for at in backs if at is not None), default=None) if None not in backs else None

    def _forget(self, now: float) -> None:
        over = {digest for digest, record in self._records.items() if now >= record.until}
        for digest in over - {request.digest for request in self._requests.values()} if over else ():
            del self._records[digest]
