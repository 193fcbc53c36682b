"""The endpoint, called as a remote workflow calls it: real Executor, real broker, real agent and workers."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain

pytestmark = pytest.mark.globus


def pack(*texts: str, **more: Any) -> dict[str, Any]:
    items = [
        {"path": "/v1/chat/completions", "body": {"model": "tiny", "messages": [{"role": "user", "content": text}]}}
        for text in texts
    ]
    return {"version": 1, "key": uuid.uuid4().hex, "deadline_s": 30, "wait": True, "items": items, **more}


def test_a_call_is_answered_by_the_model(globus_chain: Chain) -> None:
    answer = globus_chain.call(pack("hello", "again"))
    assert [item["status"] for item in answer["items"]] == [200, 200]
    assert "tiny" in answer["items"][0]["body"]["choices"][0]["message"]["content"]
