"""Ask an engine how it is, over TLS, as the gateway's agent. Readiness is never read out of a log."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from gateway_plugin.errors import GatewayError
from gateway_plugin.layout import Layout
from gateway_plugin.tls import ENGINE_NAME


class ProbeFailed(GatewayError):
    """An engine answered its first real request with an error, or not in time: it is loaded and cannot serve."""

    status, code, exit_code = 503, "probe_failed", 75


@dataclass(frozen=True)
class Health:
    """What ``GET /health`` brought."""

    ok: bool
    why: str = ""


def client_context(layout: Layout) -> ssl.SSLContext:
    """TLS as the agent: its certificate, and trust in the gateway's authority alone. Raises ``OSError``."""
    context = ssl.create_default_context(cafile=str(layout.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(str(layout.agent_identity))
    return context


class Probe:
    """One engine, asked by its agent."""

    def __init__(self, address: str, context: ssl.SSLContext, key: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._client = httpx.AsyncClient(
            base_url=f"https://{address}",
            verify=context,
            headers={"authorization": f"Bearer {key}"},
            trust_env=False,  # no proxy of the site's between agent and engine
        )

    async def close(self) -> None:
        """Let go of the connections."""
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
            answer = await self._client.get("/health", timeout=timeout_s, extensions=_named())
        except httpx.HTTPError as error:
            return Health(False, f"/health: {type(error).__name__} {error}".strip())
        return Health(answer.status_code == 200, f"/health answers {answer.status_code}")

    async def ask(self, model: str, task: Literal["generate", "embed"], timeout_s: float = 120.0) -> None:
        """One real request, as small as there is. Raises ``ProbeFailed`` with the engine's answer."""
        problem = ""
        for path, body in _requests(model, task):
            try:
                answer = await self._client.post(path, json=body, timeout=timeout_s, extensions=_named())
            except httpx.HTTPError as error:
                raise ProbeFailed(
                    f"its first request, {path}, failed: {type(error).__name__} {error}".strip()
                ) from None
            if answer.status_code == 200 and _answered(answer):
                return
            problem = problem or f"its first request, {path}, was answered {answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in (400, 404, 405):  # those may mean that it has no such path
                break
        raise ProbeFailed(problem)


def _named() -> dict[str, Any]:
    return {"sni_hostname": ENGINE_NAME}


def _requests(model: str, task: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    if task == "embed":
        return (("/v1/embeddings", {"model": model, "input": ["ready?"]}),)
    message = {"role": "user", "content": "Hi"}
    return (  # the plain one first: a base model has no chat template
        ("/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 1}),
        ("/v1/chat/completions", {"model": model, "messages": [message], "max_tokens": 1}),
    )


def _answered(answer: httpx.Response) -> bool:
    try:
        body = answer.json()
    except ValueError:
        return False
    return isinstance(body, dict) and bool(body.get("choices") or body.get("data"))
