"""Bodies at the ingress: how slowly they may come, and how much of them is held."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from gateway_plugin.errors import GatewayError, InvalidRequest, RateLimited, RequestTimeout, Unavailable
from serve.ingress.body import Pace, parse_document, read_bounded
from serve.ingress.budget import Budget


def request(*chunks: bytes, pause_s: float = 0.0) -> Request:
    """A request whose body comes in these pieces, and goes on for ever if the last is empty."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        piece = left.pop(0) if left else b"x"
        return {"type": "http.request", "body": piece, "more_body": bool(left) or not chunks[-1]}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


async def test_a_body_that_trickles_is_refused_whatever_its_length() -> None:
    pace = Pace(within_s=0.05, bytes_per_s=1000)
    with pytest.raises(RequestTimeout, match="bytes so far"):
        await read_bounded(request(b"x", b"", pause_s=0.01), 1 << 20, pace)
    assert await read_bounded(request(*[b"x" * 100] * 8, pause_s=0.02), 1 << 20, pace) == b"x" * 800


async def test_a_body_is_held_by_key_and_in_all_and_given_back() -> None:
    budget = Budget(in_all=250, per_key=100)
    first = budget.hold("ann")
    await read_bounded(request(b"x" * 60, b"x" * 40), 1000, held=first)
    second = budget.hold("ann")
    with pytest.raises(RateLimited, match="over 100 bytes"):
        await read_bounded(request(b"x"), 1000, held=second)
    second.end()
    others = [budget.hold(name) for name in ("bob", "eve")]
    others[0].more(100)
    with pytest.raises(Unavailable) as refused:
        others[1].more(51)
    assert refused.value.headers()["Retry-After"]
    for hold in (first, first, *others):
        hold.end()
    assert budget.held == 0
    budget.hold("ann").more(100)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.booleans())))
def test_never_over_budget_and_nothing_is_lost(steps: list[tuple[str, int, bool]]) -> None:
    budget = Budget(in_all=150, per_key=100)
    holds = []
    for tag, count, ends in steps:
        hold = budget.hold(tag)
        try:
            hold.more(count)
            holds.append(hold)
        except GatewayError:
            hold.end()
        assert budget.held <= 150
        if ends and holds:
            holds.pop().end()
    for hold in holds:
        hold.end()
    assert budget.held == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": ' * 5000 + b"1" + b"}" * 5000,
        b"[" * 5000 + b"]" * 5000,
        rb'{"model": "\ud800"}',
        rb'{"\udc00": 1}',
        b"1" * 5000,
    ],
)
def test_documents_that_cannot_be_handed_on_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_document(body)
    json.dumps(refused.value.body())
