"""The warm tier at one engine: asleep, its weights lie in host memory and its GPUs are free; awake, it serves again.

This is vLLM's sleep level 1 (``--enable-sleep-mode``, ``VLLM_SERVER_DEV_MODE=1``; see ``argv.py``). It can fail in ways
that the engine does not report: the GPU memory stays taken, the weights are damaged, the call never returns. So every
step is compared with the engine's earlier state, and any doubt is answered ``Reload``: stop it, load it afresh.

    note       after loading: keep the answer to one small request, the canary
    fall_asleep   /sleep, then (1) it reports that it sleeps, (2) each GPU's memory is free but for a rest
    wake       /wake_up, then (1) it reports that it is awake, (2) each GPU holds what it freed, (3) the same canary

The caller sends the engine no request from ``fall_asleep`` until ``wake`` returned ``Awake``, and starts, stops, wakes
or puts to sleep no other engine on the same GPUs while one of the two runs: memory is read by GPU, not by process.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway_plugin.engine_kinds import Task
from serve.agent.node import DevicesUnseen, nvidia_smi
from serve.agent.probe import Probe, ProbeFailed
from serve.agent.probe_requests import Trial

Mib = tuple[int, ...]
"""MiB in use on each of an engine's GPUs, in the order of its GPUs."""

_KEPT_MIB = 4096
"""The most that an engine may keep of a GPU while it sleeps: CUDA's context, libraries, captured graphs. Measured: 1.1
GiB at 8 billion parameters, 1.4 at 32 (docs/switching.md)."""
_KEPT_BY_RANK_MIB = 8192
"""Likewise of one with several GPUs: buffers of NCCL and of its own all-reduce, and larger graphs. Not measured here;
8.2 GiB were reported for eight ranks (vLLM's pull request 12695)."""
_KEPT_SHARE = 0.5
"""Likewise, as a share of what the catalog gives it; the smaller of the two counts."""
_MORE_MIB = 512
"""By which the memory taken at a wake may exceed what was freed: graphs and buffers are allocated lazily."""
_LESS_SHARE = 0.25
"""The share of what was freed that it need not take at a wake. A sleep also empties torch's cache of activations, which
the next long prompts fill again: measured 1.2 of 24 GiB. Lost weights are the canary's to find."""
_CLOSE = 0.05
"""By which a log probability may differ, or a vector, of its length: kernels may be chosen anew after a wake. (A
component by itself tells nothing: those of a vector with 4096 are about 0.016, and those of an empty one 0.)"""
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Patience:
    """Bounds in seconds; past one of them the engine is in doubt."""

    sleep_s: float = 300.0
    """For ``/sleep``. Long: it waits for what is in flight, and the first time host memory is pinned for the weights:
    measured at 2.4 to 7.7 GiB/s of them with the environment that ``argv.py`` gives it, at 0.7 to 1.5 without."""
    wake_s: float = 60.0
    settle_s: float = 3.0
    """For memory, and for the state that ``/is_sleeping`` reports, after the call returned."""
    answer_s: float = 30.0
    """For the canary, and for ``/is_sleeping``."""


@dataclass(frozen=True)
class Canary:
    """The answer to one small request, the same as long as the weights are whole."""

    text: str
    numbers: tuple[float, ...]
    """The log probability of its token, or the vector's components; empty where the engine returns none."""


@dataclass(frozen=True)
class Asleep:
    """The engine sleeps."""

    freed_mib: Mib
    took_s: float


@dataclass(frozen=True)
class Awake:
    """The engine serves as it did before it slept."""

    taken_mib: Mib
    took_s: float
    """From the call to the checked canary."""


@dataclass(frozen=True)
class Reload:
    """The engine is in doubt: stop it, and load the model afresh when it is asked for."""

    reason: str


def doubt_about_sleep(sleeping: bool, before: Mib, after: Mib, memory_mib: int) -> str:
    """Why an engine that was put to sleep must be stopped; ``""``: it sleeps.

    Args:
        sleeping: answer of ``/is_sleeping``.
        before: memory in use on its GPUs before the call, ``after``: after it.
        memory_mib: its memory of each GPU in the catalog, or what it holds if that is less.
    """
    if not sleeping:
        return "it was put to sleep and says that it is awake"
    least_mib = _least_freed_mib(memory_mib, len(before))
    for index, (was, is_now) in enumerate(zip(before, after, strict=True)):
        if (freed := was - is_now) < least_mib:
            return f"asleep it freed {freed} MiB of its GPU {index}; expected {least_mib} of {memory_mib}"
    return ""


def holds_too_little(bare: Mib, loaded: Mib, memory_mib: int) -> str:
    """Why an engine is not to sleep at all; ``""``: it may.

    One that holds less than half of what it is given, such as an encoder without KV cache, frees next to nothing: it
    would be in doubt after each sleep, and be loaded again for that.

    Args:
        bare: memory in use on its GPUs before it was started, ``loaded``: once it was loaded.
        memory_mib: its memory of each GPU in the catalog.
    """
    for index, (was, is_now) in enumerate(zip(bare, loaded, strict=True)):
        if (holds := is_now - was) < memory_mib * _KEPT_SHARE:
            return f"it holds {holds} MiB of its GPU {index}, of {memory_mib} that its catalog entry gives it"
    return ""


def _least_freed_mib(memory_mib: int, gpus: int) -> int:
    kept_mib = _KEPT_MIB if gpus == 1 else _KEPT_BY_RANK_MIB
    return memory_mib - min(kept_mib, int(memory_mib * _KEPT_SHARE))


def doubt_about_wake(
    sleeping: bool, freed: Mib, before: Mib, after: Mib, noted: Canary, answered: Canary | None
) -> str:
    """Why an engine that was woken must not be sent requests; ``""``: it serves as before.

    Args:
        sleeping: answer of ``/is_sleeping``.
        freed: memory that its GPUs gained when it fell asleep.
        before: memory in use on its GPUs before the call, ``after``: after the canary.
        noted: the canary's answer after loading; ``answered``: the one now, ``None`` if it was no answer.
    """
    if sleeping:
        return "it was woken and says that it sleeps"
    for index, (gave, was, is_now) in enumerate(zip(freed, before, after, strict=True)):
        if not gave * (1 - _LESS_SHARE) <= (took := is_now - was) <= gave + _MORE_MIB:
            return f"awake it took {took} MiB of its GPU {index}, asleep it had freed {gave}"
    if answered is None or not same_answer(noted, answered):
        return "after its sleep it answers the same request differently"
    return ""


def same_answer(noted: Canary, answered: Canary) -> bool:
    """Whether two answers to the canary are the same, but for rounding."""
    if noted.text != answered.text or len(noted.numbers) != len(answered.numbers):
        return False
    apart = math.dist(noted.numbers, answered.numbers)
    return apart <= _CLOSE * (math.hypot(*noted.numbers) if len(noted.numbers) > 1 else 1.0)  # never for a NaN


class Sleeper:
    """One engine, put to sleep and woken by its agent."""

    def __init__(
        self,
        probe: Probe,
        model: str,
        task: Task,
        used_mib: Callable[[], Awaitable[Mib]],
        patience: Patience = Patience(),
    ) -> None:
        """``used_mib``: memory in use on the engine's GPUs; raises ``DevicesUnseen``. See ``used_mib_of``."""
        self._probe = probe
        self._model = model
        self._task = task
        self._used_mib = used_mib
        self._patience = patience
        self.loaded: Mib = ()
        """Memory in use on its GPUs when its canary was noted."""

    async def note(self, bare: Mib = (), memory_mib: int = 0) -> Canary | Reload:
        """The canary's answer, asked once it is loaded; ``Reload``: it must never sleep, because it gives none, or does
        not say that it is awake, or the memory of its GPUs cannot be read or is too little (``holds_too_little``;
        ``bare`` empty: that is not known)."""
        try:
            self.loaded = await self._used_mib()
            if bare and (too_little := holds_too_little(bare, self.loaded, memory_mib)):
                return Reload(too_little)
            if await self._sleeps():
                return Reload("it says that it sleeps")
            answered = await self._ask()
        except (ProbeFailed, DevicesUnseen) as failure:
            return Reload(str(failure))
        return answered or Reload("it gives no answer that can be compared later")

    async def fall_asleep(self, memory_mib: int) -> Asleep | Reload:
        """Let it finish its requests and put it to sleep. ``memory_mib``: its memory of each GPU in the catalog, or
        what it holds if that is less."""
        begun = time.monotonic()
        try:
            before = await self._used_mib()
            await self._order("/sleep?level=1&mode=wait", self._patience.sleep_s)
            settled_by = time.monotonic() + self._patience.settle_s
            while True:
                after = await self._used_mib()
                doubt = doubt_about_sleep(await self._sleeps(), before, after, memory_mib)
                if not doubt:
                    return Asleep(_less(before, after), time.monotonic() - begun)
                if time.monotonic() >= settled_by:
                    return Reload(doubt)
                await asyncio.sleep(_LOOK_EVERY_S)
        except (ProbeFailed, DevicesUnseen) as failure:
            return Reload(f"it was put to sleep: {failure}")

    async def wake(self, asleep: Asleep, noted: Canary) -> Awake | Reload:
        """Wake it, and send it the canary before any other request."""
        begun = time.monotonic()
        try:
            before = await self._used_mib()
            await self._order("/wake_up", self._patience.wake_s)
            settled_by = time.monotonic() + self._patience.settle_s
            while (sleeping := await self._sleeps()) and time.monotonic() < settled_by:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_EVERY_S)
            answered = None if sleeping else await self._ask()
            after = await self._used_mib()
        except (ProbeFailed, DevicesUnseen) as failure:
            return Reload(f"it was woken: {failure}")
        doubt = doubt_about_wake(sleeping, asleep.freed_mib, before, after, noted, answered)
        return Reload(doubt) if doubt else Awake(_less(after, before), time.monotonic() - begun)

    async def _order(self, path: str, timeout_s: float) -> None:
        status, answer = await self._probe.call("POST", path, None, timeout_s)
        if status != 200:
            raise ProbeFailed(f"{path} was answered {status}: {answer[:200].decode(errors='replace')}")

    async def _sleeps(self) -> bool:
        status, answer = await self._probe.call("GET", "/is_sleeping", None, self._patience.answer_s)
        try:
            said = json.loads(answer)["is_sleeping"]
        except (ValueError, LookupError, TypeError, RecursionError):
            said = None
        if status != 200 or not isinstance(said, bool):
            raise ProbeFailed(f"/is_sleeping was answered {status}: {answer[:200].decode(errors='replace')}")
        return said

    async def _ask(self) -> Canary | None:
        """The canary. ``None``: an answer without what is compared. Raises ``ProbeFailed`` if there is none."""
        tried = _requests(self._model, self._task)
        return canary_of(await self._probe.first_good(tried, lambda status, _: status == 200, self._patience.answer_s))


def _requests(model: str, task: str) -> tuple[Trial, ...]:
    """The same answer each time: the likeliest token and how likely it is, or a vector."""
    if task == "embed":
        return (Trial("/v1/embeddings", {"model": model, "input": ["ready?"]}),)
    greedy = {"model": model, "max_tokens": 1, "temperature": 0}
    message = {"role": "user", "content": "Hi"}
    return (
        Trial("/v1/completions", {**greedy, "prompt": "Hi", "logprobs": 1}),
        Trial("/v1/chat/completions", {**greedy, "messages": [message], "logprobs": True, "top_logprobs": 1}),
    )


def canary_of(answer: bytes) -> Canary | None:
    """The compared part of an OpenAI answer: text and log probability of a completion, or the vector; pure."""
    try:
        body = json.loads(answer)
        if data := body.get("data"):
            return _canary("", data[0]["embedding"])
        choice = body["choices"][0]
        told = choice.get("logprobs") or {}
        if "message" in choice:
            return _canary(choice["message"]["content"] or "", [word["logprob"] for word in told.get("content") or ()])
        return _canary(choice["text"], told.get("token_logprobs") or ())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _canary(text: str, numbers: list[float] | tuple[float, ...]) -> Canary | None:
    found = Canary(text, tuple(float(number) for number in numbers))
    usable = (found.text or found.numbers) and all(math.isfinite(number) for number in found.numbers)
    return found if usable else None


def _less(whole: Mib, part: Mib) -> Mib:
    return tuple(a - b for a, b in zip(whole, part, strict=True))


async def used_mib_of(gpus: tuple[str, ...], timeout_s: float = 10.0) -> Mib:
    """Memory in use on these GPUs, by index or UUID as in ``CUDA_VISIBLE_DEVICES``. Raises ``DevicesUnseen``."""
    said = await nvidia_smi("--query-gpu=memory.used", "--id=" + ",".join(gpus), timeout_s=timeout_s)
    if len(used := said.split()) != len(gpus) or not all(mib.isdecimal() for mib in used):
        raise DevicesUnseen(f"nvidia-smi: {said[:200].strip()}")
    return tuple(int(mib) for mib in used)
