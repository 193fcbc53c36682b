"""Short questions to a gateway again and again while something else loads it, from threads that do nothing else."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_PAUSE_S = 0.05
_TICK_S = 0.01
_GIVE_UP_S = 60.0


@dataclass(frozen=True)
class Question:
    """What one thread asks."""

    name: str
    path: str
    body: bytes | None = None
    """POST with it; GET without."""
    kept: bool = False
    """On one connection that is kept; else each time on a new one."""
    key: str = ""


@dataclass(frozen=True)
class Reply:
    """One answer, or why there was none. Seconds."""

    at: float
    """Monotonic, when it was asked."""
    connect_s: float
    """Of the whole: connection and TLS handshake."""
    took_s: float
    trouble: str = ""


@dataclass
class Asked:
    """What all threads saw."""

    replies: dict[str, list[Reply]] = field(default_factory=dict)
    late_s: float = 0.0
    """The longest that a thread of this process slept too long: its own share of the times above."""


@contextmanager
def probing(host: str, port: int, trust: ssl.SSLContext, questions: Sequence[Question]) -> Iterator[Asked]:
    """Ask from now until the block ends, one thread a question; each waits for its last answer then."""
    asked = Asked({question.name: [] for question in questions})
    over = threading.Event()

    def ask(question: Question) -> None:
        connection: http.client.HTTPSConnection | None = None
        while not over.wait(_PAUSE_S):
            began = time.monotonic()
            shaken, trouble = began, ""
            try:
                if connection is None:
                    connection = http.client.HTTPSConnection(host, port, context=trust, timeout=_GIVE_UP_S)
                    connection.connect()
                    shaken = time.monotonic()
                status = _once(connection, question)
                trouble = "" if status == 200 else str(status)
            except (OSError, http.client.HTTPException) as error:
                trouble = type(error).__name__
            ended = time.monotonic()
            asked.replies[question.name].append(Reply(began, shaken - began, ended - began, trouble))
            if connection is not None and (trouble or not question.kept):
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def tick() -> None:
        while not over.is_set():
            began = time.monotonic()
            time.sleep(_TICK_S)
            asked.late_s = max(asked.late_s, time.monotonic() - began - _TICK_S)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    threads.append(threading.Thread(target=tick))
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _once(connection: http.client.HTTPSConnection, question: Question) -> int:
    headers: Mapping[str, str] = {"authorization": f"Bearer {question.key}"} if question.key else {}
    method = "GET" if question.body is None else "POST"
    connection.request(method, question.path, question.body, dict(headers))
    response = connection.getresponse()
    response.read()
    return response.status
