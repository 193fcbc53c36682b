"""Pressure against possession in the baselines' loop, which can express all of it: an experiment."""

from __future__ import annotations

from collections.abc import Sequence

from serve.core import events as ev
from serve.simulate.habits import Habits, Numbers
from serve.simulate.house import House, Seat


class Pressure:
    """A model without a place has the weight of its waiters, an engine that of the waiting which its loss would cause;
    the victims are those of the least total worth."""

    summed = True

    def __init__(self, numbers: Numbers | None = None) -> None:
        self.numbers = numbers or Numbers()
        self.habits = Habits(self.numbers)

    def begin(self, house: House) -> None:
        return

    def saw(self, house: House, event: ev.Event, now: float) -> None:
        if isinstance(event, ev.Acquire) and not event.not_routed:
            self.habits.asked(event.model, now)
        elif isinstance(event, ev.EdgeSeen):
            for seen in event.servers:
                seat = house.seats.get(seen.engine)
                if seat is not None:
                    self.habits.used(seat.model, seen.last_used, seat.ready_at, now)

    def _pressure(self, house: House, model: str, now: float) -> float:
        ages_s = [now - since for since, _ in house.waiting[model].tickets.values()]
        return self.numbers.pressure(ages_s, house.load_time_s(model))

    def overdue(self, house: House, model: str, now: float) -> bool:
        return self.numbers.overdue(now - house.waiting[model].oldest, house.load_time_s(model))

    def order(self, house: House, now: float) -> Sequence[str]:
        """Models past their bound by age; then by pressure per GPU."""

        def key(model: str) -> tuple[bool, float, str]:
            if self.overdue(house, model, now):
                return (False, house.waiting[model].oldest, model)
            return (True, -self._pressure(house, model, now) / max(1, house.models[model].gpus), model)

        return sorted(house.waiting, key=key)

    def worth(self, house: House, seat: Seat, asking: str, now: float) -> float | None:
        load_s = house.load_time_s(seat.model)
        busy = seat.in_flight > 0 or now < seat.ready_at + 2.0
        if busy and now < seat.ready_at + self.numbers.quantum * load_s and not self.overdue(house, asking, now):
            return None
        return self.loss(house, seat.model, busy, load_s + house.load_time_s(asking), now)

    def loss(self, house: House, model: str, busy: bool, away_s: float, now: float) -> float:
        """Seconds of waiting that the loss of its place would cause."""
        likely = 1.0 if busy else self.habits.likely(model, away_s, now)
        return self.numbers.loss(likely, self.habits.rate(model, now), house.load_time_s(model))

    def may_switch(self, house: House, asking: str, victims: Sequence[Seat], worth: float, now: float) -> bool:
        if self.overdue(house, asking, now):
            return True
        return self._pressure(house, asking, now) >= self.numbers.hysteresis * worth

    def unload(self, house: House, seat: Seat, now: float) -> bool:
        return False
