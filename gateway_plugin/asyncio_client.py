"""The client's calls for ``asyncio``, as ``AsyncOpenAI`` is to ``OpenAI``.

async with AsyncClient(endpoint=ID) as site:
    answers = await asyncio.gather(*(site.chat(prompt, MODEL) for prompt in prompts))   # in few tasks, all the same
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from gateway_plugin.api_types import Prompt
from gateway_plugin.client import Client

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class AsyncClient:
    """``Client`` with methods to be awaited; the arguments are the same. ``sync`` is the client underneath.

    Make it before the loop runs, or in a thread, where Globus may still have to ask for a login.
    """

    _make: type[Client] = Client

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.sync = self._make(*arguments, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close connections, ``openai``'s included; never waits for answers."""
        await asyncio.to_thread(self.sync.close)
        if "async_openai" in vars(self.sync):
            await self.sync.async_openai.close()

    @property
    def openai(self) -> AsyncOpenAI:
        """The real one."""
        return self.sync.async_openai

    async def chat(self, prompt: Prompt, model: str, **options: Any) -> str:
        """The answer's text; see ``Client.chat``."""
        return await self.submit_chat(prompt, model, **options)

    async def embed(self, texts: str | Sequence[str], model: str, **options: Any) -> list[list[float]]:
        """One vector a text, in order. An error ends the other requests, too."""
        parts = self.sync.submit_embed(texts, model, **options)
        try:
            return [vector for part in await asyncio.gather(*map(asyncio.wrap_future, parts)) for vector in part]
        except BaseException:
            for part in parts:
                part.cancel()
            raise

    def submit_chat(self, prompt: Prompt, model: str, **options: Any) -> asyncio.Future[str]:
        """A future of ``chat``'s answer, of the running loop; ``cancel()`` takes out a prompt that was not sent yet."""
        return asyncio.wrap_future(self.sync.submit_chat(prompt, model, **options))

    async def submit(self, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """The whole answer to any inference request."""
        return await asyncio.wrap_future(self.sync.submit(path, body, **options))

    async def map_chat(
        self, prompts: Iterable[Prompt], model: str, *, return_errors: bool = False, **options: Any
    ) -> list[Any]:
        """The answers' texts, in order; cancelled, what was not sent is not sent. For a bar use ``sync.map_chat`` in a
        thread.
        """
        return await self._gather(*self.sync.begin_chats(prompts, model, **options), return_errors)

    async def map_file(
        self, path: str, sha256: str, count: int, *, return_errors: bool = False, **options: Any
    ) -> list[Any]:
        """The whole answers to lines of a JSONL file at the site; cancelled as ``map_chat`` is."""
        return await self._gather(*self.sync.begin_lines(path, sha256, count, **options), return_errors)

    async def _gather(self, group: str, futures: list[Future[Any]], return_errors: bool) -> list[Any]:
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=return_errors)
        finally:
            await asyncio.to_thread(self.sync.release, group)

    def __getattr__(self, name: str) -> Any:
        """Any other method of ``Client``, in a thread: ``models``, ``wait_until_ready``, ``resume``, ...; and its plain
        attributes: ``url``, ``timeout_s``, ...
        """
        if name.startswith("_") or name == "sync":
            raise AttributeError(name)
        found = getattr(self.sync, name)
        return partial(asyncio.to_thread, found) if callable(found) else found
