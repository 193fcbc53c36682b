"""The batcher's stories, turn by turn, with a clock of their own."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from gateway_plugin.api_types import chat_text
from gateway_plugin.channel import File
from gateway_plugin.errors import (
    AnswerTooLarge,
    EndpointUnavailable,
    Forbidden,
    GatewayError,
    TaskFailed,
    WaitDeadline,
)
from gateway_plugin.globus.client.batcher import Batcher
from gateway_plugin.globus.client.batches import Batch, BatchKey, Call, Limits, Pace, after_failure, runs, size
from gateway_plugin.globus.client.protocol import Span, parse_key
from gateway_plugin.globus.client.sdk_transport import task_failure
from gateway_plugin.globus.client.transport import Next, TransportError
from tests.support.fake_endpoint import FakeTransport, chat_item, echo

KEY = BatchKey("group", "lane", "m", True, 100.0)
AGAIN = TransportError(EndpointUnavailable("gone"), Next.AGAIN)
REFUSED = TransportError(Forbidden("no"), Next.NOTHING)
TOO_LARGE = TransportError(AnswerTooLarge("big"), Next.SMALLER)


class World:
    """A batcher, a transport, and the time."""

    def __init__(
        self, *, held: bool = False, items: int = 4, lines: int = 4, requests: int = 100, under_way: int = 64
    ) -> None:
        self.now = 1000.0
        self.transport = FakeTransport(held=held)
        self.ended: list[tuple[Batch, Future[Any]]] = []
        self.batcher = Batcher(
            self.transport,
            lambda batch, future: self.ended.append((batch, future)),
            Limits(items=items, lines=lines, under_way=under_way),
            Pace(requests, 10.0),
        )
        self.wake: float | None = None

    def offer(self, *words: str, key: BatchKey = KEY) -> list[Call]:
        calls = [
            Call(
                item,
                size(item, self.now),
                self.now + key.timeout_s,
                lambda body: body["choices"][0]["message"]["content"],
            )
            for item in map(chat_item, words)
        ]
        self.batcher.offer(key, calls)
        return calls

    def turn(self, after_s: float = 0.0) -> None:
        self.now += after_s
        while self.ended:
            self.batcher.finish(*self.ended.pop(0), self.now)
        self.wake = self.batcher.turn(self.now)

    def settle(self) -> None:
        """Let time pass until nothing is due."""
        self.turn()
        for _ in range(100):
            if self.ended:
                self.turn()
            elif self.wake is None:
                return
            else:
                self.turn(max(0.0, self.wake - self.now))
        raise AssertionError("there is always something due")


def words(calls: list[Call]) -> list[Any]:
    return [call.future.exception(0) or call.future.result(0) for call in calls]


def test_prompts_wait_for_company_and_travel_together() -> None:
    world = World()
    calls = world.offer("a", "b")
    world.turn()
    assert world.transport.sent == []
    assert world.wake == pytest.approx(1000.05)
    world.offer("c")
    world.turn(0.05)
    assert [len(request["items"]) for request in world.transport.requests] == [3]
    world.turn()
    assert words(calls) == ["re: a", "re: b"]


def test_a_full_pack_goes_at_once() -> None:
    world = World()
    world.offer(*"abcdefghi")
    world.turn()
    assert [len(request["items"]) for request in world.transport.requests] == [4, 4]
    world.settle()
    keys = [parse_key(request["key"]) for request in world.transport.requests]
    assert keys == [Span("lane", 0, 4), Span("lane", 4, 4), Span("lane", 8, 1)]


def test_the_function_gets_less_time_than_the_prompt_has() -> None:
    world = World(held=True)
    world.offer("a")
    world.turn(0.05)
    assert world.transport.requests[0]["deadline_s"] == pytest.approx(99.95 - 5.0)


def test_two_models_never_share_a_task() -> None:
    world = World()
    other = BatchKey("group", "other", "n", True, 100.0)
    world.offer("a")
    world.offer("b", key=other)
    world.settle()
    assert [len(request["items"]) for request in world.transport.requests] == [1, 1]


def test_where_the_service_makes_us_wait_packs_grow() -> None:
    world = World(requests=1, items=64)
    first = world.offer("a")
    world.turn(0.05)
    later = [call for word in "bcdef" for call in world.offer(word)]
    world.turn(1.0)
    assert len(world.transport.sent) == 1
    assert world.wake == pytest.approx(1010.05)
    world.settle()
    assert [len(request["items"]) for request in world.transport.requests] == [1, 5]
    assert words([*first, *later]) == [f"re: {word}" for word in "abcdef"]


def test_what_the_site_has_not_done_yet_holds_the_rest_back() -> None:
    world = World(held=True, items=1, under_way=2)
    calls = world.offer("a", "b", "c")
    world.turn()
    assert len(world.transport.sent) == 2
    assert world.wake == pytest.approx(1100.0)
    assert calls[2].future.cancel()
    world.transport.answer_all()
    world.offer("d")
    world.settle()
    assert [request["items"][0]["body"]["messages"][0]["content"] for request in world.transport.requests] == [
        "a",
        "b",
        "d",
    ]


def test_a_prompt_that_was_not_sent_can_be_cancelled_and_one_that_was_cannot() -> None:
    world = World(held=True)
    kept, dropped = world.offer("a", "b")
    assert dropped.future.cancel()
    world.turn(0.05)
    assert [len(request["items"]) for request in world.transport.requests] == [1]
    assert not kept.future.cancel()
    world.transport.answer_all()
    world.turn()
    assert words([kept]) == ["re: a"]


def test_a_failed_submission_is_sent_again_with_the_same_key() -> None:
    world = World()
    world.transport.failures = [AGAIN, AGAIN]
    calls = world.offer("a", "b")
    world.settle()
    assert words(calls) == ["re: a", "re: b"]
    assert len({request["key"] for request in world.transport.requests}) == 1
    assert len(world.transport.requests) == 3


def test_a_refusal_is_final_for_its_pack_and_the_next_goes_on() -> None:
    world = World()
    world.transport.failures = [REFUSED]
    refused = world.offer("a")
    world.settle()
    assert isinstance(refused[0].future.exception(0), Forbidden)
    fine = world.offer("b")
    world.settle()
    assert words(fine) == ["re: b"]


def test_a_service_that_stays_away_is_given_up() -> None:
    world = World()
    world.transport.failures = [AGAIN] * 50
    calls = world.offer("a")
    world.settle()
    assert isinstance(calls[0].future.exception(0), EndpointUnavailable)
    assert len(world.transport.sent) == 5


def test_tasks_that_an_endpoint_dropped_after_an_outage_are_sent_again_as_they_are() -> None:
    """Each start command that it finds too old fails every task of its user: the first ones sent again, too."""
    world = World(items=2)
    dropped = task_failure("Ignoring command from server\nCommand too old or skew between system clocks is too large.")
    left = [4]

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise dropped
        return echo(request)

    world.transport.infer = infer
    calls = world.offer("a", "b", "c")
    world.settle()
    assert words(calls) == ["re: a", "re: b", "re: c"]
    assert len(world.transport.requests) == 6
    assert len({request["key"] for request in world.transport.requests}) == 2


def test_what_is_too_large_together_travels_in_halves() -> None:
    world = World()

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        if len(request["items"]) > 1:
            raise TOO_LARGE
        return echo(request)

    world.transport.infer = infer
    calls = world.offer("a", "b", "c", "d")
    world.settle()
    assert words(calls) == ["re: a", "re: b", "re: c", "re: d"]
    assert [len(request["items"]) for request in world.transport.requests] == [4, 2, 2, 1, 1, 1, 1]


def test_what_is_too_large_by_itself_is_an_error() -> None:
    world = World()
    world.transport.failures = [TOO_LARGE] * 9
    calls = world.offer("a", "b")
    world.settle()
    assert all(isinstance(call.future.exception(0), AnswerTooLarge) for call in calls)
    assert len(world.transport.sent) == 3


def test_an_answer_that_was_left_out_for_room_is_asked_for_alone() -> None:
    world = World()

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        answer = echo(request)
        if len(request["items"]) > 1:
            answer["items"][1] = {"status": 413, "error": {"code": "result_too_large", "message": "big"}}
        return answer

    world.transport.infer = infer
    calls = world.offer("a", "b", "c")
    world.settle()
    assert words(calls) == ["re: a", "re: b", "re: c"]
    assert [parse_key(request["key"]) for request in world.transport.requests] == [
        Span("lane", 0, 3),
        Span("lane", 1, 1),
    ]


def test_answers_that_were_left_out_for_room_are_asked_for_in_packs_as_large_as_fitted() -> None:
    world = World(items=12)

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        answer = echo(request)
        for number in range(4, len(answer["items"])):
            answer["items"][number] = {"status": 413, "error": {"code": "result_too_large", "message": "big"}}
        return answer

    world.transport.infer = infer
    calls = world.offer(*"abcdefghijkl")
    world.settle()
    assert words(calls) == [f"re: {word}" for word in "abcdefghijkl"]
    places = [parse_key(request["key"]) for request in world.transport.requests]
    assert places == [Span("lane", 0, 12), Span("lane", 4, 4), Span("lane", 8, 4)]


def test_answers_that_are_all_too_large_by_themselves_are_errors_and_no_endless_loop() -> None:
    world = World()
    large = {"status": 413, "error": {"code": "result_too_large", "message": "big"}}
    world.transport.infer = lambda request: {**echo(request), "items": [large] * len(request["items"])}
    calls = world.offer("a", "b", "c")
    world.settle()
    assert all(isinstance(call.future.exception(0), AnswerTooLarge) for call in calls)
    assert len(world.transport.requests) == 4


@pytest.mark.parametrize(
    ("numbers", "most", "expected"),
    [([], 3, []), ([2], 1, [(2, 1)]), ([0, 1, 2, 3, 7, 8], 3, [(0, 3), (3, 1), (7, 2)]), ([1, 2], 1, [(1, 1), (2, 1)])],
)
def test_runs(numbers: list[int], most: int, expected: list[tuple[int, int]]) -> None:
    assert runs(numbers, most) == expected


def test_a_lost_task_ends_with_the_clients_own_deadline() -> None:
    world = World(held=True)
    calls = world.offer("a")
    world.turn(0.05)
    assert world.wake == pytest.approx(1100.0)
    world.turn(99.95)
    error = calls[0].future.exception(0)
    assert isinstance(error, WaitDeadline)
    assert "resume('group')" in str(error)
    world.transport.answer_all()  # too late, and nobody minds
    world.turn()
    assert world.wake is None


def test_a_prompt_that_was_never_sent_says_so_at_its_deadline() -> None:
    world = World(requests=1)
    world.offer("a")
    world.turn(0.05)
    late = world.offer("b", key=BatchKey("group", "short", "m", True, 2.0))
    world.settle()
    error = late[0].future.exception(0)
    assert isinstance(error, WaitDeadline)
    assert "not sent" in str(error)
    assert "rate limit" in str(error)


def test_a_prompt_behind_others_at_the_endpoint_is_told_so() -> None:
    world = World(held=True, items=1, under_way=2)
    world.offer("a", "b")
    world.turn()
    late = world.offer("c", key=BatchKey("group", "short", "m", True, 2.0))
    world.turn(0.05)
    world.turn(2.0)
    assert "2 batches are at the endpoint" in str(late[0].future.exception(0))
    world.transport.answer_all()
    world.settle()
    hurried = world.offer("d", key=BatchKey("group", "none", "m", True, 0.01))
    world.turn(0.02)
    assert "too short" in str(hurried[0].future.exception(0))


def test_a_prompt_with_a_deadline_behind_it_does_not_take_the_pack_with_it() -> None:
    world = World(held=True)
    old = world.offer("a")
    world.turn(0.04)
    young = world.offer("b")
    world.turn(0.01)
    world.turn(99.95)
    assert isinstance(old[0].future.exception(0), WaitDeadline)
    world.transport.answer_all()
    world.turn()
    assert words(young) == ["re: b"]


def test_each_prompt_of_a_pack_has_its_own_error() -> None:
    world = World()

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        answer = echo(request)
        answer["items"][0] = {"status": 503, "error": {"code": "model_unavailable", "message": "m", "state": "failed"}}
        return answer

    world.transport.infer = infer
    bad, good = world.offer("a", "b")
    world.settle()
    error = bad.future.exception(0)
    assert isinstance(error, GatewayError)
    assert (error.code, error.state) == ("model_unavailable", "failed")
    assert words([good]) == ["re: b"]


def test_an_answer_of_another_form_is_an_error_of_its_prompt() -> None:
    world = World()
    world.transport.infer = lambda request: {**echo(request), "items": [{"status": 200, "body": {"choices": []}}]}
    calls = world.offer("a")
    world.settle()
    assert isinstance(calls[0].future.exception(0), TaskFailed)


def test_released_nothing_more_is_sent_or_expected() -> None:
    world = World(held=True, requests=1, items=1)
    sent, waiting = world.offer("a", "b")
    world.turn()
    world.batcher.forget("group")
    assert waiting.future.cancelled()
    assert isinstance(sent.future.exception(0), EndpointUnavailable)
    assert world.transport.released == ["group"]
    world.turn(60.0)
    assert len(world.transport.sent) == 1


def test_at_the_end_what_waits_is_cancelled_and_what_is_in_flight_is_given_up() -> None:
    world = World(held=True, requests=1, items=1)
    sent, waiting = world.offer("a", "b")
    world.turn()
    world.batcher.end()
    assert waiting.future.cancelled()
    assert isinstance(sent.future.exception(0), EndpointUnavailable)
    assert world.transport.closed
    world.transport.answer_all()  # too late
    world.turn()
    assert world.wake is None


def test_lines_of_a_file_travel_as_a_range() -> None:
    world = World()
    key = BatchKey("group", "lane", "jobs/p.jsonl", True, 100.0, File("jobs/p.jsonl", "0" * 64, 10), 6)
    calls = [Call({"line": n}, size({"line": n}, world.now), 1100.0, lambda body: body) for n in range(10, 16)]
    world.batcher.offer(key, calls)
    world.settle()
    assert [(r["input"]["start"], r["input"]["count"]) for r in world.transport.requests] == [(10, 4), (14, 2)]
    assert [parse_key(r["key"]) for r in world.transport.requests] == [Span("lane", 0, 4, 6), Span("lane", 4, 2, 6)]
    assert calls[5].future.result(0)["choices"][0]["message"]["content"] == "re: line 15"


def test_lines_that_are_too_many_at_a_time_travel_in_halves() -> None:
    """A file's lines weigh nothing here: only the site knows how long they are."""
    world = World(lines=8)

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        if request["input"]["count"] > 2:
            return {"version": 1, "error": {"code": "pack_too_large", "message": "m", "type": "invalid_request_error"}}
        return echo(request)

    world.transport.infer = infer
    key = BatchKey("group", "lane", "jobs/p.jsonl", True, 100.0, File("jobs/p.jsonl", "0" * 64, 10), 8)
    calls = [Call({"line": n}, size({"line": n}, world.now), 1100.0, chat_text) for n in range(10, 18)]
    world.batcher.offer(key, calls)
    world.settle()
    assert words(calls) == [f"re: line {number}" for number in range(10, 18)]
    assert [request["input"]["count"] for request in world.transport.requests] == [8, 4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("then", "attempt", "count", "remaining_s", "expected"),
    [
        (Next.NOTHING, 0, 4, 100.0, (Next.NOTHING, 0.0)),
        (Next.SMALLER, 0, 1, 100.0, (Next.NOTHING, 0.0)),
        (Next.SMALLER, 3, 4, 100.0, (Next.SMALLER, 0.0)),
        (Next.AGAIN, 0, 4, 100.0, (Next.AGAIN, 1.0)),
        (Next.AGAIN, 3, 4, 100.0, (Next.AGAIN, 10.0)),
        (Next.AGAIN, 4, 4, 100.0, (Next.NOTHING, 0.0)),
        (Next.AGAIN, 0, 4, 0.5, (Next.NOTHING, 0.0)),
    ],
)
def test_what_becomes_of_a_failure(
    then: Next, attempt: int, count: int, remaining_s: float, expected: tuple[Next, float]
) -> None:
    assert after_failure(then, attempt, count, remaining_s) == expected


def test_the_parts_of_a_span_lie_in_it() -> None:
    span = Span("l", 5, 3, 9)
    assert (span.part(0, 1), span.part(1, 2)) == (Span("l", 5, 1, 9), Span("l", 6, 2, 9))
