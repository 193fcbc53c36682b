"""A transport with the site's function behind it in this process: answers and failures are set by the test.

The contract with Globus Compute itself: tests/globus/test_client.py runs the same cases over the real chain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from gateway_plugin.errors import TaskFailed
from gateway_plugin.globus.client.transport import Next, TransportError

Infer = Callable[[dict[str, Any]], dict[str, Any]]


def echo(request: dict[str, Any]) -> dict[str, Any]:
    """As the function does: each prompt's own text, and the key."""
    items = request.get("items")
    if items is None:
        place = request["input"]
        lines = range(place["start"], place["start"] + place["count"])
        items = [chat_item(f"line {number}") for number in lines]
    return {
        "version": 1, "function": "1.0.0", "key": request["key"], "seconds": 0.01, "repeated": False,
        "items": [{"status": 200, "body": answer_to(item)} for item in items],
    }  # fmt: skip


def chat_item(words: str) -> dict[str, Any]:
    return {"path": "/v1/chat/completions", "body": {"model": "m", "messages": [{"role": "user", "content": words}]}}


def answer_to(item: Mapping[str, Any]) -> dict[str, Any]:
    words = item["body"]["messages"][-1]["content"]
    message = {"role": "assistant", "content": f"re: {words}"}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}


class FakeTransport:
    """``sent``: every request with its group, in order. ``failures``: the errors of the next submissions."""

    def __init__(self, infer: Infer = echo, *, held: bool = False) -> None:
        self.infer = infer
        self.held = held
        """Whether answers wait for ``answer_all``."""
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.failures: list[TransportError] = []
        self.released: list[str] = []
        self.closed = False
        self.state: Mapping[str, Any] = {"status": "online", "details": {}}
        self._futures: list[tuple[str, dict[str, Any], Future[Any]]] = []
        self._lock = threading.Lock()

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for _, request in self.sent]

    def submit(self, group: str, request: Mapping[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self.sent.append((group, dict(request)))
            failure = self.failures.pop(0) if self.failures else None
            if failure is None:
                self._futures.append((group, dict(request), future))
        if failure is not None:
            future.set_exception(failure)
        elif not self.held:
            self.answer_all()
        return future

    def answer_all(self) -> None:
        with self._lock:
            waiting = [entry for entry in self._futures if not entry[2].done()]
        for _, request, future in waiting:
            try:
                future.set_result(self.infer(request))
            except TransportError as error:
                future.set_exception(error)

    def failure(self, error: BaseException) -> TransportError:
        if isinstance(error, TransportError):
            return error
        return TransportError(TaskFailed(f"{type(error).__name__}: {error}"), Next.AGAIN)

    def tasks(self, group: str) -> list[Future[Any]]:
        return [future for there, _, future in self._futures if there == group]

    def endpoint(self) -> Mapping[str, Any]:
        return self.state

    def release(self, group: str) -> None:
        self.released.append(group)

    def close(self) -> None:
        self.closed = True
