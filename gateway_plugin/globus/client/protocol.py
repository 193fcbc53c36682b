"""What travels: requests to the site's function, its answers, and the keys by which they are put in order. Pure.

A key says where its batch belongs, ``NAME-START-COUNT-TOTAL-RANDOM``, and the function repeats it in its answer: so the
answers of a task group can be put in order with nothing but the group's id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway_plugin.api_types import parse_error
from gateway_plugin.errors import GatewayError, TaskFailed, WaitDeadline

VERSION = 1
BATCH_PROMPTS = 10_000
"""Of one batch at most: the function's limit."""
GROUP_PROMPTS = 1_000_000
"""Of all batches of a task group at most: an endpoint could write any number into its answers' keys."""
_KEY = re.compile(
    r"(?P<name>[A-Za-z0-9]{1,16})-(?P<start>[0-9]{1,10})-(?P<count>[0-9]{1,5})-(?P<total>[0-9]{1,10})-[A-Za-z0-9]{1,16}"
)

Answer = dict[str, Any] | GatewayError
"""Of one prompt: a body in OpenAI's form, or why there is none."""


@dataclass(frozen=True)
class Span:
    """Where a batch belongs: ``count`` prompts of the sequence ``name`` from number ``start``; the sequence has
    ``total`` in all (0: not known).
    """

    name: str
    start: int
    count: int
    total: int = 0

    def key(self, random: str) -> str:
        """An idempotency key. ``random``: letters and digits that no other key has."""
        return f"{self.name}-{self.start}-{self.count}-{self.total}-{random}"

    def part(self, first: int, count: int) -> Span:
        """The ``count`` requests from this span's number ``first`` on."""
        return Span(self.name, self.start + first, count, self.total)


def parse_key(key: object) -> Span | None:
    """The span in a key; ``None`` if it is not one of ours."""
    found = _KEY.fullmatch(key) if isinstance(key, str) else None
    if found is None or not 1 <= int(found["count"]) <= BATCH_PROMPTS:
        return None
    return Span(found["name"], int(found["start"]), int(found["count"]), int(found["total"]))


def task_request(key: str, deadline_s: float, wait: bool, **content: Any) -> dict[str, Any]:
    """The function's argument: ``items``, a list of ``{"path", "body"?}``, or ``input``, lines of a JSONL file at the
    site: ``{"path", "sha256", "start", "count"}``.
    """
    head = {"version": VERSION, "key": key, "deadline_s": round(max(0.1, deadline_s), 3), "wait": wait}
    return {**head, **content}


def too_many_lines(answer: object) -> bool:
    """Whether the function wants fewer lines of a file at a time."""
    said = answer.get("error") if isinstance(answer, Mapping) else None
    return isinstance(said, Mapping) and said.get("code") == "pack_too_large"


def unpack(answer: object, count: int) -> list[Answer]:
    """One answer a prompt, in order. What cannot be read is a ``TaskFailed`` for each; what refuses the whole, too."""
    if not isinstance(answer, Mapping):
        return [_unreadable(f"a {type(answer).__name__}")] * count
    if "error" in answer:
        return [_error(_refused_with(answer["error"]), answer)] * count
    items = answer.get("items")
    if not isinstance(items, list) or len(items) != count:
        return [_unreadable(f"{len(items) if isinstance(items, list) else 'no'} answers")] * count
    return [_item(item) for item in items]


def _item(item: object) -> Answer:
    if not isinstance(item, Mapping):
        return _unreadable(f"a {type(item).__name__}")
    status, body = item.get("status"), item.get("body")
    if not isinstance(status, int):
        return _unreadable("no status")
    if 200 <= status < 300 and isinstance(body, dict):
        return body
    return _error(status, item)


def _error(status: int, answer: Mapping[str, Any]) -> GatewayError:
    said = answer.get("error")
    retry_s = said.get("retry_after_s") if isinstance(said, Mapping) else None
    error = parse_error(status, answer, {"retry-after": str(retry_s)})
    if error.code != "deadline":
        return error
    return WaitDeadline(error.message, state=error.state, eta_s=error.eta_s)


def _refused_with(error: object) -> int:
    return 503 if isinstance(error, Mapping) and error.get("type") == "server_error" else 400


def _unreadable(what: str) -> TaskFailed:
    return TaskFailed(
        f"The endpoint's answer cannot be read ({what}): its function is another version than this client."
    )


def in_order(answers: Iterable[object]) -> list[Answer | None]:
    """The answers of a whole task group in the order of its prompts: one sequence after another, each by number.

    ``None``: a prompt whose batch was never sent, was lost, or is not yet answered. Of batches with the same prompts
    (sent again) a good answer counts. Answers without a key of ours are left out.

    Raises ``TaskFailed`` where they say that they are of more prompts than ``GROUP_PROMPTS``.
    """
    sequences: dict[str, dict[int, Answer]] = {}
    totals: dict[str, int] = {}
    for answer in answers:
        span = parse_key(answer.get("key")) if isinstance(answer, Mapping) else None
        if span is None:
            continue
        found = sequences.setdefault(span.name, {})
        totals[span.name] = max(totals.get(span.name, 0), span.total, span.start + span.count)
        if sum(totals.values()) > GROUP_PROMPTS:
            raise TaskFailed(
                f"The endpoint's answers of this task group are said to be of over {GROUP_PROMPTS:,} prompts, which no "
                "group has: send the prompts again, in smaller maps, or ask the endpoint's administrators."
            )
        for number, item in enumerate(unpack(answer, span.count), span.start):
            if not isinstance(item, GatewayError) or number not in found:
                found[number] = item
    return [sequences[name].get(number) for name in sorted(sequences) for number in range(totals[name])]
