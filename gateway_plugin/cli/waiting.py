"""One line on stderr about a model that a request waits for: ``queued: job 7 waits: Resources, ready in about 9 s``."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gateway_plugin.cli.output import TIMES, outlook, put, text
from gateway_plugin.errors import GatewayError

if TYPE_CHECKING:
    from gateway_plugin.client import Client

PATIENCE_S = 2.0
"""Before anything is said, and between two looks."""


class Waiting:
    """From here until ``end``: the model's state, live on a terminal, a line for every change elsewhere.

    The answer's own stream carries it as comments, but ``openai`` does not show them: it is asked for beside it.
    """

    def __init__(self, client: Client, model: str) -> None:
        from rich.console import Console

        self._client = client
        self._model = model
        self._console = Console(stderr=True, highlight=False)
        self._live: Any = None
        self._said = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        """Nothing is said once ``end`` has returned."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="waiting", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """The answer begins, or never will; the line goes."""
        if self._ended.is_set():
            return
        with self._lock:
            self._ended.set()
            if self._live is not None:
                self._live.stop()

    def _watch(self) -> None:
        while not self._ended.wait(PATIENCE_S):
            try:
                found = self._client.model(self._model)
            except GatewayError:
                return  # the request itself says what is wrong
            if not found.ready:
                note = outlook(found)
                self._say(f"{found.state}: {note}" if note else found.state)

    def _say(self, words: str) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            if not self._console.is_terminal:
                if TIMES.sub("", words) != TIMES.sub("", self._said):
                    put(words, err=True)
            elif self._live is None:
                self._live = self._console.status(text(words))
                self._live.start()
            else:
                self._live.update(text(words))
            self._said = words
