"""A fake engine's sleep, with vLLM's development endpoints, and its faults on demand.

``--sleep-fault`` (repeatable): ``leak`` (asleep it frees nothing), ``leak-awake`` (awake it takes twice as much),
``gibberish`` (awake it answers other text), ``weights`` (awake it answers the same text, not as likely), ``nan``,
``sleep-500``, ``wake-500``, ``sleep-hangs``, ``wake-hangs``, ``never-sleeps``, ``never-wakes`` (200, and nothing done),
``canary-hangs`` (awake it answers no request), ``nonsense`` (the answer of ``/is_sleeping`` is no JSON).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Coroutine
from typing import Any

from tests.support.fake_memory import claim
from tests.support.raw_http import Exchange

FAULTS = (
    *("leak", "leak-awake", "gibberish", "weights", "nan", "sleep-500", "wake-500", "sleep-hangs", "wake-hangs"),
    *("never-sleeps", "never-wakes", "canary-hangs", "nonsense"),
)
KEPT_MIB = 100
"""The GPU memory that a sleeping engine keeps."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--enable-sleep-mode`` as vLLM's, and the faults."""
    parser.add_argument(
        "--enable-sleep-mode", action="store_true", help="with VLLM_SERVER_DEV_MODE=1: /sleep, /wake_up"
    )
    parser.add_argument("--sleep-fault", action="append", default=[], choices=FAULTS)


class Sleep:
    """Whether it sleeps, and how often it did."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.asleep = False
        self.slept = 0
        self.without_weights = False
        self._faults = frozenset(given.sleep_fault)
        self._given = given
        self._can = given.enable_sleep_mode and os.environ.get("VLLM_SERVER_DEV_MODE") == "1"

    def takes(self, exchange: Exchange) -> bool:
        """Whether this is one of its paths. They require no key, as vLLM's."""
        return self._can and exchange.request.path in ("/sleep", "/wake_up", "/is_sleeping")

    def __call__(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        path = exchange.request.path
        if path == "/is_sleeping":
            said = b"asleep" if "nonsense" in self._faults else json.dumps({"is_sleeping": self.asleep}).encode()
            exchange.send(200, said)
            return None
        verb = path.removeprefix("/").removesuffix("_up")
        if f"{verb}-hangs" in self._faults:
            return _forever()
        if f"{verb}-500" in self._faults:
            exchange.send(500, b"as it was told")
            return None
        if f"never-{verb}s" not in self._faults:
            self._fall_asleep("level=2" in exchange.request.target) if verb == "sleep" else self._wake()
        exchange.send(200, b"")
        return None

    def _fall_asleep(self, without_weights: bool) -> None:
        self.asleep, self.without_weights = True, self.without_weights or without_weights
        self.slept += 1
        if "leak" not in self._faults:
            self._hold(KEPT_MIB)

    def _wake(self) -> None:
        self.asleep = False
        self._hold(self._given.memory_mib * (2 if "leak-awake" in self._faults else 1))

    def _hold(self, mib: int) -> None:
        if self._given.memory_marker is not None:
            claim(self._given.memory_marker, mib)

    def first_word(self, model: str) -> tuple[str, float]:
        """Of a greedy answer, and how likely it is: the same each time, unless its sleep went wrong."""
        strange = self.slept > 0 and ("gibberish" in self._faults or self.without_weights)
        unlikely = self.slept > 0 and "weights" in self._faults
        no_number = self.slept > 0 and "nan" in self._faults
        return "!!!!" if strange else model, float("nan") if no_number else -7.5 if unlikely else -0.25

    @property
    def hangs(self) -> bool:
        """Whether a request gets no answer: it sleeps, or woke to nothing."""
        return self.asleep or (self.slept > 0 and "canary-hangs" in self._faults)


async def _forever() -> None:
    await asyncio.Event().wait()
