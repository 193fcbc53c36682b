"""Packing and pace, as properties."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.globus.client.batches import ENVELOPE_BYTES, VECTOR_BYTES, Limits, Pace, Size, cut, due, size

LIMITS = Limits(request_bytes=1000, answer_bytes=2000, items=8, flush_s=0.05)
sizes = st.builds(Size, st.integers(1, 1500), st.integers(1, 2500), st.just(0.0))


def packs(waiting: list[Size], limits: Limits = LIMITS) -> list[list[Size]]:
    found = []
    while waiting:
        count = cut(waiting, limits)
        assert count > 0
        found.append(waiting[:count])
        waiting = waiting[count:]
    return found


@given(st.lists(sizes, max_size=60))
def test_every_prompt_is_in_exactly_one_pack_and_in_order(waiting: list[Size]) -> None:
    assert [entry for pack in packs(waiting) for entry in pack] == waiting


@given(st.lists(sizes, max_size=60))
def test_a_pack_of_two_or_more_is_below_every_limit(waiting: list[Size]) -> None:
    for pack in packs(waiting):
        assert len(pack) <= LIMITS.items
        if len(pack) > 1:
            assert sum(entry.request_bytes for entry in pack) <= LIMITS.request_bytes
            assert sum(entry.answer_bytes for entry in pack) <= LIMITS.answer_bytes


@given(st.lists(sizes, min_size=2, max_size=60))
def test_no_pack_could_have_taken_the_next_prompt_too(waiting: list[Size]) -> None:
    found = packs(waiting)
    for pack, following in itertools.pairwise(found):
        more = [*pack, following[0]]
        assert (
            len(more) > LIMITS.items
            or sum(entry.request_bytes for entry in more) > LIMITS.request_bytes
            or sum(entry.answer_bytes for entry in more) > LIMITS.answer_bytes
        )


@given(st.lists(st.tuples(sizes, st.floats(0, 2)), min_size=1, max_size=60))
def test_no_prompt_waits_longer_than_the_flush_time(arrivals: list[tuple[Size, float]]) -> None:
    """Played as the dispatcher does it: a pack is sent when it is due; the pace permits everything here."""
    times = sorted(when for _, when in arrivals)
    coming = [
        Size(found.request_bytes, found.answer_bytes, when) for (found, _), when in zip(arrivals, times, strict=True)
    ]
    waiting: list[Size] = []
    sent = 0
    while coming or waiting:
        when = due(waiting, LIMITS)
        if when is None or (coming and coming[0].since < when):
            waiting.append(coming.pop(0))
            continue
        now = max(when, waiting[-1].since)
        count = cut(waiting, LIMITS)
        assert all(now - entry.since <= LIMITS.flush_s + 1e-9 for entry in waiting[:count])
        waiting, sent = waiting[count:], sent + count
    assert sent == len(arrivals)


def test_a_full_pack_does_not_wait() -> None:
    waiting = [Size(1, 1, since=5.0)] * LIMITS.items
    assert due(waiting, LIMITS) == 5.0
    assert due(waiting[1:], LIMITS) == 5.05
    assert due([], LIMITS) is None


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_prompts_size_is_what_travels(words: Any) -> None:
    """The SDK writes the arguments as JSON, and that text once more into the JSON that it posts."""
    item = {"path": "/v1/completions", "body": {"prompt": words}}
    posted = json.dumps({"tasks": {"f": ["11\n" + json.dumps([{"items": [item]}])]}})
    assert json.dumps(json.dumps(item))[1:-1] in posted
    assert size(item).request_bytes <= len(posted)


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError):
        size({"path": "/v1/completions", "body": {"prompt": object()}})
    with pytest.raises(ValueError, match="JSON"):
        size({"path": "/v1/completions", "body": {"temperature": float("nan")}})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input": ["a", "b"]}, 2 * VECTOR_BYTES),
        ({"input": "a"}, VECTOR_BYTES),
        ({"max_tokens": 100, "n": 2}, 1200),
        ({"max_completion_tokens": 10, "max_tokens": 100}, 60),
        ({"max_tokens": "many"}, 2048 * 6),
        ({}, 2048 * 6),
        (None, 0),
    ],
)
def test_an_answers_size_is_guessed_from_what_it_may_be(body: Any, expected: int) -> None:
    assert size({"path": "/", "body": body}).answer_bytes == ENVELOPE_BYTES + expected


@given(st.lists(st.floats(0, 5), min_size=1, max_size=80))
def test_no_window_holds_more_requests_than_the_pace(gaps: list[float]) -> None:
    pace, now, sent = Pace(requests=5, window_s=10.0), 0.0, list[float]()
    for gap in gaps:
        now = max(now + gap, pace.next(now + gap))
        pace = pace.spend(now)
        sent.append(now)
    for first, sixth in zip(sent, sent[5:], strict=False):
        assert sixth - first >= 10.0 - 1e-6


def test_the_first_requests_go_at_once() -> None:
    pace = Pace(requests=2, window_s=10.0)
    assert pace.next(100.0) == 100.0
    pace = pace.spend(100.0).spend(101.0)
    assert pace.next(102.0) == 110.0
    assert pace.next(110.5) == 110.5
