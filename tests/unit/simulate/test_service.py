"""How an engine shares itself among what is in flight."""

from __future__ import annotations

import random

import pytest

from serve.simulate.service import Service


def test_one_alone_takes_its_time() -> None:
    service = Service(beside=1.0)
    service.begin(7, 4.0, now=10.0)

    assert service.next_end() == 14.0
    assert service.end(14.0) == 7
    assert service.next_end() is None


def test_two_at_half_their_pace_each_end_when_counted_by_hand() -> None:
    service = Service(beside=1.0)  # with one other in flight each takes twice as long
    service.begin(1, 4.0, now=0.0)
    service.begin(2, 4.0, now=2.0)  # 1 has 2 s of work left, at half its pace

    assert service.next_end() == 6.0
    assert service.end(6.0) == 1
    assert service.next_end() == 8.0  # 2 did 2 s of its work beside 1, and has 2 s left alone
    assert service.end(8.0) == 2


def test_work_is_conserved() -> None:
    chance = random.Random(5)
    service = Service(beside=4.0)
    given, done, now = 0.0, 0.0, 0.0
    arrivals = sorted(chance.uniform(0, 50) for _ in range(100))
    for number, at in enumerate(arrivals):
        while (end := service.next_end()) is not None and end <= at:
            done += (end - now) * len(service) / (1 + (len(service) - 1) / 4.0)
            now = end
            service.end(end)
        if len(service):
            done += (at - now) * len(service) / (1 + (len(service) - 1) / 4.0)
        now = at
        work = chance.uniform(0.1, 3)
        given += work
        service.begin(number, work, at)
    while (end := service.next_end()) is not None:
        done += (end - now) * len(service) / (1 + (len(service) - 1) / 4.0)
        now = end
        service.end(end)

    assert done == pytest.approx(given)


def test_a_cut_empties_it() -> None:
    service = Service(beside=1.0)
    service.begin(1, 4.0, now=0.0)
    service.begin(2, 5.0, now=0.0)

    assert sorted(service.cut()) == [1, 2]
    assert len(service) == 0
