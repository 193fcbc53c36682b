"""The Python client: a real ``openai.OpenAI`` for inference, and the gateway's own calls beside it.

    from gateway_plugin import Client

    with Client() as gateway:                        # over HTTP; Client(endpoint=ID): through Globus Compute
        gateway.wait_until_ready("smollm2-135m-instruct")
        gateway.openai.chat.completions.create(model="smollm2-135m-instruct", messages=[...])
        answers = gateway.map_chat(prompts, "smollm2-135m-instruct")

Needs neither Ray nor vLLM; through Globus Compute it needs ``gateway-plugin[globus]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from gateway_plugin.api_types import Prompt, chat_body, chat_text, split_options, vectors, whole
from gateway_plugin.calls import CHAT, EMBEDDINGS, Calls
from gateway_plugin.channel import WAIT_HEADER, Channel, File, Item, Map, gathered, result_of
from gateway_plugin.errors import ConfigError, GatewayError, InvalidRequest
from gateway_plugin.http_channel import HttpChannel, gateway_error, unreachable
from gateway_plugin.model_header import naming_async_client, naming_client

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI, OpenAIError

__all__ = ["Client", "gateway_error", "unreachable"]

REQUEST_TIMEOUT_S = 3600.0
"""Of one inference request: the gateway holds it while its model loads (half an hour, or as the site says)."""


_How = tuple[bool, float, dict[str, str]]
"""``wait``, ``timeout_s`` and ``headers`` of an ``Item``."""


class Client(Calls):
    """One gateway, as a user or an administrator sees it, over HTTP or through Globus Compute. Thread-safe.
    In a forked process it goes on over HTTP; through an endpoint each process needs one of its own.

    Args:
        base_url: such as ``https://127.0.0.1:8180``, with or without ``/v1``.
        api_key: as ``gateway keys create`` printed it.
        state: a gateway's state folder, for one that runs on this machine or file system.
        endpoint: id of a site's Globus Compute endpoint, instead of a URL, key or state folder.
        function: of that endpoint; else ``$GATEWAY_FUNCTION``, else what was registered from this machine.
        ca: file with the certificates of the authority that signed the gateway's: what ``gateway ca`` prints.
            Default: ``$GATEWAY_CA``, else ``$SSL_CERT_FILE``, else the system's.
        plain_http: send key and prompts also over plain HTTP, to any program that listens there. Default:
            ``$GATEWAY_PLAIN_HTTP`` is 1.
        timeout_s: of one inference request, waiting for the model included; through an endpoint at most six hours.
        transport: for tests.
        channel: another way to a gateway; for ``GlobusClient``.

    Raises:
        GatewayError: from every method: the gateway's own answer, ``GatewayUnreachable``, ``WaitDeadline``; through an
            endpoint also ``EndpointUnavailable`` and ``TaskFailed``.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        state: str | Path | None = None,
        *,
        endpoint: str | None = None,
        function: str | None = None,
        ca: str | Path | None = None,
        plain_http: bool | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
        channel: Channel | None = None,
    ) -> None:
        if endpoint is not None:
            if any(value is not None for value in (base_url, api_key, state, ca)):
                raise ConfigError("endpoint: a gateway's URL, key, state folder or ca cannot be given with it.")
            from gateway_plugin.globus.client.channel import GlobusChannel

            channel = GlobusChannel(endpoint, function)
        self.timeout_s = timeout_s
        super().__init__(channel or HttpChannel(base_url, api_key, state, ca, plain_http, transport))
        try:
            self._limit(None)
        except InvalidRequest:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections, ``openai``'s included (``async_openai``'s on its own loop); never waits for answers. Tasks
        at an endpoint go on there, and ``resume`` fetches their answers.
        """
        self._channel.close()
        self._http.close()
        if "openai" in self.__dict__:
            self.openai.close()

    @cached_property
    def openai(self) -> OpenAI:
        """The real one; its requests name their model in the header ``x-gateway-model``, too. Its errors are
        ``openai``'s own; ``error_of`` translates them.
        """
        client = httpx.Client(timeout=self.timeout_s, **self._channel.options(asynchronous=False))
        return naming_client(**self._openai_options(client))

    @cached_property
    def async_openai(self) -> AsyncOpenAI:
        """The same for ``asyncio``; close it yourself (``await client.async_openai.close()``)."""
        client = httpx.AsyncClient(timeout=self.timeout_s, **self._channel.options(asynchronous=True))
        return naming_async_client(**self._openai_options(client))

    def _openai_options(self, client: httpx.Client | httpx.AsyncClient) -> dict[str, Any]:
        # openai's 2 is made of httpx and its 3 of httpx2, of which it takes either client.
        channel = self._channel
        return {
            "base_url": f"{channel.base_url}/v1", "api_key": channel.key, "timeout": self.timeout_s,
            "max_retries": channel.retries, "http_client": client,
        }  # fmt: skip

    def error_of(self, error: OpenAIError) -> GatewayError:
        """The gateway's own error for one that ``openai`` raised."""
        return gateway_error(error, self.url, self.at_hand)

    # --- inference ---
    def submit(
        self, path: str, body: Mapping[str, Any] | None = None, *, wait: bool = True, timeout_s: float | None = None
    ) -> Future[dict[str, Any]]:
        """A future of the whole answer to any inference request, such as ``/v1/rerank``; without ``body`` a GET.

        Args:
            wait: for a model that is not ready; otherwise an error with its ``state`` and ``eta_s`` comes at once, and
                the model is loaded all the same.
            timeout_s: from the call until the answer, instead of the client's (a map's prompt over HTTP: from when it
                is sent). Then the future ends with ``WaitDeadline``.

        ``cancel()`` ends a request over HTTP; through an endpoint it is ``True`` only for one that was not sent yet.
        """
        return self._channel.submit(Item(path, body, whole, wait, self._limit(timeout_s)))

    def submit_chat(
        self,
        prompt: Prompt,
        model: str,
        *,
        system: str | None = None,
        wait: bool = True,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Future[str]:
        """A future of ``chat``'s answer."""
        chosen, how = self._how(options, wait, timeout_s)
        return self._channel.submit(Item(CHAT, chat_body(prompt, model, system, chosen), chat_text, *how))

    def chat(self, prompt: Prompt, model: str, **options: Any) -> str:
        """The answer's text.

        Args:
            prompt: text, or messages in OpenAI's form.
            options: ``system`` (a message put before it); ``wait`` and ``timeout_s`` as of ``submit``; the rest of the
                chat completion: ``temperature``, ``max_tokens``, ``extra_body``, ... As in ``openai``, ``timeout`` is
                ``timeout_s``, and ``extra_headers`` are sent as headers: over HTTP; through an endpoint there is
                ``x-gateway-wait: 0`` alone, which is ``wait=False`` everywhere. For streaming: ``openai``.

        Raises ``NothingSaid`` where the answer ended before its first word.
        """
        answer: str = result_of(self.submit_chat(prompt, model, **options), self._channel)
        return answer

    def submit_embed(
        self,
        texts: str | Sequence[str],
        model: str,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[Future[list[list[float]]]]:
        """Futures of ``embed``'s vectors, one for every 256 texts (through an endpoint: 32)."""
        members, many = [texts] if isinstance(texts, str) else list(texts), self._channel.texts
        chosen, how = self._how(options, wait, timeout_s)
        asked = {"model": model, "encoding_format": "base64", **chosen}  # base64: a quarter of the bytes
        chunks = [members[start : start + many] for start in range(0, len(members), many)]
        return [self._channel.submit(Item(EMBEDDINGS, {**asked, "input": chunk}, vectors, *how)) for chunk in chunks]

    def embed(self, texts: str | Sequence[str], model: str, **options: Any) -> list[list[float]]:
        """One vector a text, in order; for a single text a list of one. Options: of ``submit``, and of the request.
        An error or Ctrl-C ends the other requests, too.
        """
        parts = self.submit_embed(texts, model, **options)
        try:
            return [vector for part in parts for vector in result_of(part, self._channel)]
        except BaseException:
            for part in parts:
                part.cancel()
            raise

    def map_chat(
        self,
        prompts: Iterable[Prompt],
        model: str,
        *,
        return_errors: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Any]:
        """The answers' texts, in order. Ctrl-C ends it; through an endpoint it prints how to fetch what is under way.

        Args:
            return_errors: put a ``GatewayError`` in an answer's place; otherwise the first one ends the whole.
            progress: a bar on stderr; by default on a terminal.
            options: as of ``chat``, and ``concurrency``: requests in flight over HTTP (16); ``task_group_id``, through
                an endpoint: a UUID that you choose and keep, to ``resume`` by if this process is lost.
        """
        group, futures = self.begin_chats(prompts, model, **options)
        return gathered(self._channel, group, futures, return_errors, progress, model)

    def begin_chats(
        self,
        prompts: Iterable[Prompt],
        model: str,
        *,
        system: str | None = None,
        wait: bool = True,
        timeout_s: float | None = None,
        concurrency: int = 16,
        task_group_id: str | None = None,
        **options: Any,
    ) -> Map:
        """``map_chat``'s group and futures, for a caller that gathers them; then ``release`` the group."""
        if concurrency < 1:
            raise InvalidRequest(f"concurrency: expected 1 or more, got {concurrency}")
        chosen, how = self._how(options, wait, timeout_s)
        items = [Item(CHAT, chat_body(prompt, model, system, chosen), chat_text, *how) for prompt in prompts]
        return self._channel.map(items, model, concurrency, task_group_id)

    def map_file(
        self,
        path: str,
        sha256: str,
        count: int,
        *,
        return_errors: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Any]:
        """The whole answers to ``count`` lines of a JSONL file that lies at an endpoint's site.

        Args:
            path: below the site's input folder; a line is ``{"path": "/v1/chat/completions", "body": {...}}``.
            sha256: of the file: if it is another one by now, nothing is computed.
            options: ``start`` (number of the first line, 0), ``wait``, ``timeout_s``, ``task_group_id``.
        """
        group, futures = self.begin_lines(path, sha256, count, **options)
        return gathered(self._channel, group, futures, return_errors, progress, path)

    def begin_lines(
        self,
        path: str,
        sha256: str,
        count: int,
        *,
        start: int = 0,
        wait: bool = True,
        timeout_s: float | None = None,
        task_group_id: str | None = None,
    ) -> Map:
        """``map_file``'s group and futures, as ``begin_chats``."""
        items = [Item(path, None, whole, wait, self._limit(timeout_s))] * count
        return self._channel.map(items, path, 1, task_group_id, File(path, sha256, start))

    def release(self, group: str) -> None:
        """End what is left of a map that ``begin_chats`` or ``begin_lines`` began."""
        self._channel.release(group)

    def resume(self, task_group_id: str, timeout_s: float | None = None, progress: bool | None = None) -> list[Any]:
        """The answers of an earlier map through an endpoint, by any process, in order; waits for those under way.

        In place of a missing answer: the prompt's own ``GatewayError``, or ``TaskFailed`` for one that was never sent,
        or whose result Globus Compute no longer has (half an hour after it was ready).

        Raises:
            NotFound: the service knows no such task group, or it is another user's.
            InvalidRequest: over HTTP.
        """
        return self._channel.resume(task_group_id, self._limit(timeout_s), progress)

    def _how(self, options: Mapping[str, Any], wait: bool, timeout_s: float | None) -> tuple[dict[str, Any], _How]:
        """The body's options, and the rest of an ``Item``."""
        body, headers = split_options(options)
        limit_s = self._limit(body.pop("timeout", timeout_s))
        if headers.get(WAIT_HEADER) == "0":
            del headers[WAIT_HEADER]
            wait = False
        return body, (wait, limit_s, headers)

    def _limit(self, timeout_s: float | None) -> float:
        chosen, longest_s = self.timeout_s if timeout_s is None else timeout_s, self._channel.longest_s
        if not 0 < chosen <= longest_s:
            most = "" if longest_s == math.inf else f" and at most {longest_s:.0f} s"
            raise InvalidRequest(f"timeout_s: expected more than 0{most}, got {chosen!r}")
        return float(chosen)
