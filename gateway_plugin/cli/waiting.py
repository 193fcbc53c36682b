"""The state of a model on stderr, while a request waits for it: ``m: queued (job 7 waits: Resources, ...)``."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

from gateway_plugin.cli.output import Steps, outlook
from gateway_plugin.errors import GatewayError

if TYPE_CHECKING:
    from gateway_plugin.client import Client

PATIENCE_S = 2.0
"""Delay before the first output, and poll interval."""


class Waiting:
    """Shows the model's state until ``end``. The answer's own stream carries it as comments, but ``openai`` does not
    expose them, so the state is polled separately.
    """

    def __init__(self, client: Client, model: str) -> None:
        self._client, self._model = client, model
        self._steps: Steps | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        """Nothing is shown once ``end`` has returned."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="waiting", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """The answer begins, or will not come: remove the display."""
        with self._lock:
            self._ended.set()
            if self._steps is not None:
                self._steps.__exit__()
            self._steps = None

    def _watch(self) -> None:
        began = time.monotonic()
        steps = Steps("waiting", quiet=False)
        while not self._ended.wait(PATIENCE_S):
            try:
                found = self._client.model(self._model)
            except GatewayError:
                return  # the request's own error explains it
            with self._lock:
                if self._ended.is_set():
                    return
                if self._steps is None:
                    self._steps = steps.__enter__()
                if not found.ready:
                    steps.update([(found.name, found.state, outlook(found))], time.monotonic() - began)
