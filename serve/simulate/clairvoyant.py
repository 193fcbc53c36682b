"""Belady's rule with costs: weights and worths as the gateway has them, of a policy that knows every arrival."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from serve.simulate.house import House, Rule, Seat

HYSTERESIS = 0.7
"""Seconds of waiting ended for each second of waiting that a switch causes."""
IMPATIENCE = 0.5
"""How much more a second of waiting weighs for each load time that the oldest waiter has waited."""
QUANTUM = 1.0
"""A model that has requests keeps its place for so many of its load times."""
BOUND_S, BOUND_LOADS = 60.0, 4.0


class Clairvoyant(Rule):
    """It knows every arrival of the trace. A model without a place weighs the seconds that its waiters have waited; an
    engine is worth the seconds of waiting that its absence will cause: requests that come while it loads again wait for
    the rest of the load; less in proportion where that lies farther ahead than the switch and the way back take.
    ``bounded``: a model past its bound is next, at any cost to others."""

    summed = True

    def __init__(self, arrivals: Mapping[str, Sequence[float]], bounded: bool) -> None:
        self._arrivals = arrivals
        self.bounded = bounded

    def _pressure(self, house: House, model: str, now: float) -> float:
        ages_s = [now - since for since, _ in house.waiting[model].tickets.values()]
        return sum(ages_s) * (1 + IMPATIENCE * ages_s[0] / house.load_time_s(model))

    def overdue(self, house: House, model: str, now: float) -> bool:
        """Whether the bound would be passed if its load did not begin now."""
        load_s = house.load_time_s(model)
        return self.bounded and now - house.waiting[model].oldest >= max(BOUND_S, BOUND_LOADS * load_s) - load_s

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
        if busy and now < seat.ready_at + QUANTUM * load_s and not self.overdue(house, asking, now):
            return None
        return self._loss(seat.model, load_s, load_s + house.load_time_s(asking), now)

    def _loss(self, model: str, load_s: float, away_s: float, now: float) -> float:
        times = self._arrivals.get(model, ())
        first = bisect_right(times, now)
        if first == len(times):
            return 0.0
        last = bisect_right(times, times[first] + load_s)
        waited = sum(load_s - (time - times[first]) for time in times[first:last])
        return waited * min(1.0, away_s / max(0.1, times[first] - now))

    def may_switch(self, house: House, asking: str, victims: Sequence[Seat], worth: float, now: float) -> bool:
        return self.overdue(house, asking, now) or self._pressure(house, asking, now) >= HYSTERESIS * worth

    def unload(self, house: House, seat: Seat, now: float) -> bool:
        return False
