"""Places at the edge's doors: whatever the limits, their sum fits, and nobody's flood takes the places of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.edge.places import Places, places
from gateway_plugin.errors import ServiceError

LIMITS = st.integers(min_value=0, max_value=1 << 20)
RELAYED = st.integers(min_value=1, max_value=20_000)
SLOTS = st.integers(min_value=1, max_value=256)


def files_used(held: Places) -> int:
    """Counted as connections are made, one by one, with every place taken."""
    callers = held.callers + held.owner
    engines_of_warm = held.busy
    to_cold_door, cold_door, serve, inner_door, engine = (held.cold,) * 5
    return callers + engines_of_warm + to_cold_door + cold_door + serve + inner_door + engine


def divided(limit: int, relayed: int, slots: int) -> Places | None:
    """The places, if there are enough open files at all."""
    try:
        return places(limit, relayed, slots)
    except ServiceError:
        return None


@given(LIMITS, RELAYED, SLOTS)
def test_never_more_open_files_than_there_are(limit: int, relayed: int, slots: int) -> None:
    held = divided(limit, relayed, slots)
    if held is None:
        assert limit < 256 + 8 * slots + 320
        return
    checks = 8 * slots
    assert files_used(held) + checks + 256 + held.files // 32 <= held.files <= limit


@given(LIMITS, RELAYED, SLOTS)
def test_waiters_leave_places_to_all_others(limit: int, relayed: int, slots: int) -> None:
    held = divided(limit, relayed, slots)
    if held is None:
        return
    assert min(16, relayed) <= held.cold <= relayed
    assert held.busy >= held.cold, "warm requests have places that no waiter can take"
    assert held.callers >= 2 * held.busy + held.cold, "and so has whoever is to be told that there is no room"
    assert held.callers - held.refused >= 2 * held.busy + held.cold, "also while refused callers go on sending"
    assert held.owner >= 12
    assert 2 * held.per_source <= held.callers
    assert held.connections >= held.callers + held.owner + 2 * held.cold


@given(LIMITS, RELAYED, SLOTS, st.integers(min_value=1, max_value=2000))
def test_one_key_leaves_places_to_others(limit: int, relayed: int, slots: int, wanted: int) -> None:
    held = divided(limit, relayed, slots)
    if held is None:
        return
    one = held.of_one_key(wanted)
    assert 1 <= one <= wanted
    assert one == 1 or 2 * one <= held.cold <= held.busy


def test_limits_of_common_machines() -> None:
    small, here, large = places(4096, 1500), places(20_000, 1500), places(1 << 20, 1500)
    assert (small.cold, small.busy, small.owner, small.callers) == (266, 311, 48, 1511)
    assert here.cold == large.cold == 1500
    assert here.callers > 8900, "so many idle connections of one machine leave room"
    assert large.files == 32768
    assert places(1 << 20, 10_000).cold == 10_000, "open files are taken as the site's limit needs them"


def test_too_few_open_files_are_said_with_what_would_do() -> None:
    with pytest.raises(ServiceError, match=r"1000 open files .* raise it \(ulimit -Hn\) to 1088 at least"):
        places(1000, 1000)
    assert places(1088, 1000).cold >= 16
