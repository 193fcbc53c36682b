"""Requests to an engine over TLS, as the gateway's agent. Readiness is never read from a log."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from gateway_plugin.engine_kinds import Task
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout
from gateway_plugin.tls import ENGINE_NAME
from serve.agent.probe_requests import Trial, answered, trials

_ANSWER_BYTES = 2**20
"""Larger than an answer of one token or one vector, and small enough for an agent to hold."""
_METRICS_BYTES = 2**23
"""vLLM's are some 100 KB an engine core."""
_NAMED: dict[str, Any] = {"sni_hostname": ENGINE_NAME}


class ProbeFailed(GatewayError):
    """An engine answered its first real request with an error, or not in time: it is loaded and cannot serve."""

    status, code, exit_code = 503, "probe_failed", 75


@dataclass(frozen=True)
class Health:
    """Outcome of ``GET /health``."""

    ok: bool
    why: str = ""


def client_context(layout: Layout) -> ssl.SSLContext:
    """TLS as the agent: its certificate, and trust in the gateway's authority alone. Raises ``OSError``."""
    context = ssl.create_default_context(cafile=str(layout.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(str(layout.agent_identity))
    return context


class Probe:
    """One engine, probed by its agent."""

    def __init__(self, address: str, context: ssl.SSLContext, key: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._client = httpx.AsyncClient(
            base_url=f"https://{address}",
            verify=context,
            headers={"authorization": f"Bearer {key}", "accept-encoding": "identity"},
            trust_env=False,  # no proxy of the site's between agent and engine
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def listening(self) -> bool:
        """Whether something accepts connections at its address."""
        try:
            async with asyncio.timeout(2.0):
                _, writer = await asyncio.open_connection(self._host, self._port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def health(self, timeout_s: float = 10.0) -> Health:
        """``GET /health``."""
        try:
            status, _ = await self.call("GET", "/health", None, timeout_s)
        except ProbeFailed as failure:
            return Health(False, f"/health: {failure.message}")
        return Health(status == 200, f"/health answers {status}")

    async def ask(self, model: str, task: Task, timeout_s: float = 120.0) -> None:
        """One real request, as small as there is. Raises ``ProbeFailed`` with the engine's answer."""
        if tried := trials(model, task):
            await self.first_good(tried, partial(answered, task), timeout_s, "its first request, {},")

    async def first_good(
        self, tried: Iterable[Trial], good: Callable[[int, bytes], bool], timeout_s: float, named: str = "{}"
    ) -> bytes:
        """The answer to one of these requests, sent in turn until one is ``good``, by its status and body.

        Raises ``ProbeFailed`` with what the first one was answered; ``named``: what it is called there, by its path.
        """
        problem = ""
        for trial in tried:
            what = named.format(trial.path)
            try:
                status, answer = await self.call("POST", trial.path, trial.body, timeout_s, file=trial.file)
            except ProbeFailed as failure:
                raise ProbeFailed(f"{what} failed: {failure.message}") from None
            if good(status, answer):
                return answer
            problem = problem or f"{what} was answered {status}: {answer[:200].decode(errors='replace')}"
            if status not in (400, 404, 405):  # those may mean that it has no such path
                break
        raise ProbeFailed(problem)

    async def answers(self, model: str, task: Task, timeout_s: float) -> None:
        """One small request; any answer will do, be it an error. Raises ``ProbeFailed`` if none comes in time."""
        for trial in trials(model, task)[:1] or (Trial("/health", {}),):
            method = "POST" if trial.body else "GET"
            await self.call(method, trial.path, trial.body or None, timeout_s, file=trial.file)

    async def metrics(self, timeout_s: float) -> str | None:
        """``GET /metrics``; ``None``: it has no such page. Raises ``ProbeFailed`` if it does not answer in time."""
        status, answer = await self.call("GET", "/metrics", None, timeout_s, _METRICS_BYTES)
        if status in (404, 405):
            return None
        if status != 200:
            raise ProbeFailed(f"/metrics answers {status}")
        return answer.decode(errors="replace")

    async def max_model_len(self, timeout_s: float = 2.0) -> int | None:
        """Its context length in tokens, from vLLM's ``GET /v1/models``; ``None`` where that is not usable."""
        try:
            status, answer = await self.call("GET", "/v1/models", None, timeout_s)
            said = json.loads(answer)["data"][0]["max_model_len"] if status == 200 else None
        except (ProbeFailed, ValueError, LookupError, TypeError, RecursionError):
            return None  # another engine program: it serves all the same
        return said if type(said) is int and 0 < said < 10**9 else None

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        most: int = _ANSWER_BYTES,
        file: bytes = b"",
    ) -> tuple[int, bytes]:
        """Status and body. Raises ``ProbeFailed`` for one that is not whole in time, or larger than ``most`` bytes.

        ``file``: sent as a form, with the fields of ``body``.
        """
        content = bytearray()
        sent: dict[str, Any] = (
            {"data": body, "files": {"file": ("a.wav", file, "audio/wav")}} if file else {"json": body}
        )
        try:
            async with (
                asyncio.timeout(timeout_s),  # in total: httpx applies a timeout to each read
                self._client.stream(method, path, **sent, timeout=timeout_s, extensions=_NAMED) as answer,
            ):
                async for piece in answer.aiter_raw():
                    content += piece
                    if len(content) > most:
                        raise ProbeFailed(f"its answer is larger than {most} bytes")
        except TimeoutError:
            raise ProbeFailed(f"no whole answer within {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise ProbeFailed(f"{type(error).__name__} {error}".strip()) from None
        return answer.status_code, bytes(content)
