"""The same verbs for ``asyncio``, as ``AsyncOpenAI`` is to ``OpenAI``.

async with AsyncGlobusClient(ENDPOINT) as site:
    answers = await asyncio.gather(*(site.chat(prompt, MODEL) for prompt in prompts))   # packed, all the same
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from gateway_plugin.api_types import ModelInfo
from gateway_plugin.globus.client.client import GlobusClient
from gateway_plugin.globus.client.payloads import Prompt
from gateway_plugin.globus.client.status import EndpointStatus


class AsyncGlobusClient:
    """``GlobusClient`` with verbs to be awaited; the arguments are the same. ``sync`` is the one underneath.

    Make it before the loop runs, or in a thread, where Globus may still have to ask for a login.
    """

    def __init__(self, endpoint_id: str | None = None, function_id: str | None = None, **options: Any) -> None:
        self.sync = GlobusClient(endpoint_id, function_id, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go; never waits for answers."""
        await asyncio.to_thread(self.sync.close)

    async def chat(self, prompt: Prompt, model: str, **options: Any) -> str:
        """The answer's text; see ``GlobusClient.chat``."""
        return await self.submit_chat(prompt, model, **options)

    async def completions(self, prompt: str, model: str, **options: Any) -> str:
        """The text that continues ``prompt``."""
        return await self.submit_completion(prompt, model, **options)

    async def embed(self, texts: str | Sequence[str], model: str, **options: Any) -> list[list[float]]:
        """One vector a text, in order."""
        parts = self.submit_embed(texts, model, **options)
        return [vector for part in await asyncio.gather(*parts) for vector in part]

    def submit_chat(self, prompt: Prompt, model: str, **options: Any) -> asyncio.Future[str]:
        """A future of ``chat``'s answer, of the running loop; ``cancel()`` takes out a prompt that was not sent yet."""
        return asyncio.wrap_future(self.sync.submit_chat(prompt, model, **options))

    def submit_completion(self, prompt: str, model: str, **options: Any) -> asyncio.Future[str]:
        """A future of ``completions``' text."""
        return asyncio.wrap_future(self.sync.submit_completion(prompt, model, **options))

    def submit_embed(
        self, texts: str | Sequence[str], model: str, **options: Any
    ) -> list[asyncio.Future[list[list[float]]]]:
        """Futures of ``embed``'s vectors, one for every 32 texts."""
        return [asyncio.wrap_future(part) for part in self.sync.submit_embed(texts, model, **options)]

    async def submit(self, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """The whole answer to any request that the site's function takes."""
        return await asyncio.wrap_future(self.sync.submit(path, body, **options))

    async def map_chat(
        self,
        prompts: Iterable[Prompt],
        model: str,
        *,
        system: str | None = None,
        return_errors: bool = False,
        wait: bool = True,
        timeout_s: float | None = None,
        task_group_id: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """The answers' texts, in order; cancelled, what was not sent is not sent. For a bar use ``sync.map_chat`` in a
        thread.
        """
        made = self.sync._chats(prompts, model, system, wait, timeout_s, task_group_id, options)
        return await self._gather(*made, return_errors)

    async def map_file(
        self,
        path: str,
        sha256: str,
        count: int,
        *,
        start: int = 0,
        return_errors: bool = False,
        wait: bool = True,
        timeout_s: float | None = None,
        task_group_id: str | None = None,
    ) -> list[Any]:
        """The whole answers to lines of a JSONL file at the site; cancelled as ``map_chat`` is."""
        made = self.sync._lines(path, sha256, count, start, wait, timeout_s, task_group_id)
        return await self._gather(*made, return_errors)

    async def _gather(self, group: str, futures: list[Future[Any]], return_errors: bool) -> list[Any]:
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=return_errors)
        finally:
            await asyncio.to_thread(self.sync._sender.release, group)

    async def resume(self, task_group_id: str, **options: Any) -> list[Any]:
        """What came of an earlier map; see ``GlobusClient.resume``."""
        return await asyncio.to_thread(self.sync.resume, task_group_id, **options)

    async def models(self, **options: Any) -> list[ModelInfo]:
        """Every model of the site's catalog with its state."""
        return await asyncio.to_thread(self.sync.models, **options)

    async def model(self, name: str, **options: Any) -> ModelInfo:
        """One model, by name or alias. Raises ``ModelNotFound``."""
        return await asyncio.to_thread(self.sync.model, name, **options)

    async def status(self) -> EndpointStatus:
        """What Globus Compute knows of the endpoint."""
        return await asyncio.to_thread(self.sync.status)

    async def wait_until_ready(self, model: str, timeout_s: float = 1800.0, **options: Any) -> ModelInfo:
        """Have ``model`` loaded, and return when it is ready."""
        return await asyncio.to_thread(self.sync.wait_until_ready, model, timeout_s, **options)
