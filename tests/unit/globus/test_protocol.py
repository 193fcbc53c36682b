"""Requests, answers and keys."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.errors import AnswerTooLarge, GatewayError, ModelQueueFull, TaskFailed, WaitDeadline
from gateway_plugin.globus.client.protocol import Span, in_order, parse_key, task_request, unpack

places = st.builds(
    Span,
    st.from_regex(r"[A-Za-z0-9]{1,12}", fullmatch=True),
    st.integers(0, 10**9),
    st.integers(1, 10**4),
    st.integers(0, 10**9),
)


@given(places)
def test_a_key_tells_its_place_and_is_one_that_the_function_takes(span: Span) -> None:
    key = span.key("0123456789ab")
    assert parse_key(key) == span
    assert re.fullmatch(r"[A-Za-z0-9_-]{8,64}", key)


@pytest.mark.parametrize(
    "key",
    [
        None,
        7,
        "",
        "0123456789abcdef",
        "a-b-c-d-e",
        "lane-1-2-3",
        "l-0-0-1-x",
        "l-0-10001-1-x",
        "l-0-1-" + "9" * 5000 + "-x",
    ],
)
def test_another_key_tells_nothing(key: object) -> None:
    assert parse_key(key) is None


def test_a_request_has_either_prompts_or_a_place_in_a_file() -> None:
    item = {"path": "/v1/models"}
    assert task_request("k" * 8, 9.99999, True, items=[item]) == {
        "version": 1, "key": "k" * 8, "deadline_s": 10.0, "wait": True, "items": [item],
    }  # fmt: skip
    assert "input" not in task_request("k" * 8, 10, False, items=[item])


def test_each_prompt_has_an_answer_or_an_error_of_its_own() -> None:
    full = {"message": "full", "code": "model_queue_full", "state": "queue_full", "eta_s": 5, "retry_after_s": 7}
    late = {"message": "late", "code": "deadline", "state": "loading", "eta_s": 30}
    large = {"message": "large", "code": "result_too_large"}
    engine = {"message": "bad option", "code": 400, "type": "BadRequestError"}
    answers = unpack(
        {
            "items": [
                {"status": 200, "body": {"object": "chat.completion"}},
                {"status": 503, "error": full},
                {"status": 504, "error": late},
                {"status": 413, "error": large},
                {"status": 400, "error": engine},
            ]
        },
        5,
    )
    assert answers[0] == {"object": "chat.completion"}
    queue, deadline, size, option = answers[1:]
    assert isinstance(queue, ModelQueueFull)
    assert (queue.state, queue.eta_s, queue.retry_after_s) == ("queue_full", 5.0, 7.0)
    assert isinstance(deadline, WaitDeadline)
    assert (deadline.state, deadline.eta_s) == ("loading", 30.0)
    assert isinstance(size, AnswerTooLarge)
    assert isinstance(option, GatewayError)
    assert option.status == 400


def test_a_refusal_of_the_whole_is_each_prompts_error() -> None:
    refused = {"version": 1, "error": {"message": "no", "code": "path_not_allowed", "type": "invalid_request_error"}}
    answers = unpack(refused, 3)
    assert [(error.code, error.status) for error in answers if isinstance(error, GatewayError)] == [
        ("path_not_allowed", 400)
    ] * 3


@pytest.mark.parametrize(
    "answer", [None, 7, {}, {"items": []}, {"items": "xx"}, {"items": [1, 2]}, {"items": [{}, {}]}]
)
def test_what_cannot_be_read_is_an_error_and_no_traceback(answer: Any) -> None:
    found = unpack(answer, 2)
    assert len(found) == 2
    assert all(isinstance(error, TaskFailed) for error in found)


def _answer(span: Span, *texts: str | None) -> dict[str, Any]:
    items = [
        {"status": 200, "body": {"t": text}} if text else {"status": 503, "error": {"message": "x"}} for text in texts
    ]
    return {"key": span.key("abc"), "items": items}


def test_a_groups_answers_are_put_in_order_and_gaps_are_seen() -> None:
    found = in_order([_answer(Span("m", 3, 2, 6), "d", "e"), _answer(Span("m", 0, 2, 6), "a", "b")])
    assert found == [{"t": "a"}, {"t": "b"}, None, {"t": "d"}, {"t": "e"}, None]


def test_of_two_packs_with_the_same_prompt_the_good_answer_counts() -> None:
    twice = [_answer(Span("m", 0, 2, 2), "a", None), _answer(Span("m", 1, 1, 2), "b")]
    assert in_order(twice) == in_order(reversed(twice)) == [{"t": "a"}, {"t": "b"}]


def hostile(*keys: str) -> list[dict[str, Any]]:
    """What an endpoint may answer that wants to harm: a few bytes each."""
    return [{"key": key, "error": {}} for key in keys]


@pytest.mark.parametrize(
    "answers",
    [
        hostile("a-0-1-1000000000-x"),
        hostile("a-9999999999-1-1-x"),
        hostile(*(f"a{number}-0-1-400000-x" for number in range(3))),
        hostile(*(f"a{number}-0-10000-1-x" for number in range(200))),
    ],
)
def test_answers_that_claim_to_be_of_more_prompts_than_any_group_has_fill_nothing(answers: list[Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TaskFailed, match="smaller maps"):
            in_order(answers)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "error",
    [
        {"code": [[[]]], "eta_s": 10**400, "retry_after_s": 10**400},
        {"code": {"a": 1}, "eta_s": float("nan"), "retry_after_s": "inf"},
        {"message": 7, "state": [], "reason": {}, "eta_s": "1" * 5000},
    ],
)
def test_an_error_with_impossible_numbers_is_an_error_without_them(error: dict[str, Any]) -> None:
    (found,) = unpack({"items": [{"status": 503, "error": error}]}, 1)
    assert isinstance(found, GatewayError)
    assert (found.eta_s, found.retry_after_s) == (None, None)


def test_answers_of_others_are_left_out() -> None:
    assert in_order([None, {"key": "somebody-elses", "items": []}, {"items": []}]) == []
