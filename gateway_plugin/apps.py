"""Parsl apps: language models as tasks of a workflow.

    from gateway_plugin.apps import chat, embed, map_chat

    summary = chat("Summarise: ...", "smollm2-135m-instruct", max_tokens=60)   # an AppFuture of the answer's text
    vectors = embed([text, summary], "all-minilm-l6-v2")                       # takes futures as inputs
    answers = map_chat(prompts, "smollm2-135m-instruct")                       # one task, many requests at a time

A task finds the gateway where it runs: ``$GATEWAY_URL`` and ``$GATEWAY_API_KEY`` in the worker's environment, else the
state folder of a gateway on this machine or file system. Neither URL nor key travels with a task unless you name a URL.
Errors are ``GatewayError``s, raised by the future's ``result()``. An answer that ended at ``max_tokens`` before its
first word (all of them went into thinking) is one, too: ``NothingSaid``.

``Apps(endpoint=ID)`` has the same apps ask a site elsewhere, through Globus Compute: each worker process is one client
of that endpoint. Tasks that run in one process at a time (threads: Parsl's ``ThreadPoolExecutor``) travel packed; a
worker of ``HighThroughputExecutor`` runs one at a time, so there each ``chat`` is a Globus task: take ``map_chat``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gateway_plugin.api_types import chat_words
from gateway_plugin.errors import ConfigError, GatewayError

if TYPE_CHECKING:
    from parsl.app.futures import AppFuture
    from parsl.dataflow.dflow import DataFlowKernel

    from gateway_plugin.client import Client
    from gateway_plugin.connection import Connection
    from gateway_plugin.globus import GlobusClient

Prompt = str | Sequence[Mapping[str, Any]]
"""A user's words, or messages in OpenAI's form."""

_EMBED_BATCH = 256
_CLIENTS = 4


class Apps:
    """The three apps, bound to executors and to a gateway. The module's own are ``Apps()``.

    Args:
        executors: labels of the Parsl executors that may run the tasks; ``"all"`` of them.
        url: of the gateway, if the worker's environment shall not say it. The key is found on the worker.
        state: state folder of the gateway, as seen from the worker.
        ca: file with the certificates that vouch for the gateway, as seen from the worker (``Client(ca=...)``).
        endpoint: a Globus Compute endpoint, instead of a gateway; the worker needs ``gateway-plugin[globus]``.
        function: of that endpoint, if the worker's environment shall not say it (``$GATEWAY_FUNCTION``).
        data_flow_kernel: Parsl's; by default the one that is loaded when an app is called.
    """

    def __init__(
        self,
        executors: Sequence[str] | Literal["all"] = "all",
        *,
        url: str | None = None,
        state: str | Path | None = None,
        ca: str | Path | None = None,
        endpoint: str | None = None,
        function: str | None = None,
        data_flow_kernel: DataFlowKernel | None = None,
    ) -> None:
        if endpoint is not None and any(value is not None for value in (url, state, ca)):
            raise ConfigError("Apps: endpoint: a gateway's url, state or ca cannot be given with it")
        self._executors: Any = executors if executors == "all" else list(executors)
        self._where: Where = AtGateway(url, *(str(path) if path is not None else None for path in (state, ca)))
        if endpoint is not None:
            self._where = AtEndpoint(endpoint, function)
        self._dfk = data_flow_kernel

    def chat(self, prompt: Prompt | Future[Any], model: str, *, system: str | None = None, **options: Any) -> AppFuture:
        """An ``AppFuture`` of the answer's text.

        Args:
            prompt: text, messages, or a future of either.
            system: a system message put before it.
            options: passed on to ``chat.completions.create``: ``temperature``, ``max_tokens``, ...
        """
        return self._chat(prompt, model, system, options, self._where)

    def embed(self, texts: str | Sequence[str | Future[str]] | Future[Any], model: str) -> AppFuture:
        """An ``AppFuture`` of one vector (a list of floats) per text, in order; for a single text, of a list of one.

        Args:
            texts: a text, a list whose members may be futures, or a future of a list.
        """
        parts, whole = _inputs(texts)
        return self._embed(model, whole, self._where, inputs=parts)

    def map_chat(
        self,
        prompts: Sequence[Prompt | Future[Any]] | Future[Any],
        model: str,
        *,
        system: str | None = None,
        concurrency: int = 16,
        return_errors: bool = False,
        **options: Any,
    ) -> AppFuture:
        """An ``AppFuture`` of the answers' texts, in order: one task that keeps ``concurrency`` requests in flight.

        Better than one ``chat`` per prompt for many short prompts: the engine batches them, Parsl carries one task.

        Args:
            prompts: a list whose members may be futures, or a future of a list.
            return_errors: put a ``GatewayError`` in an answer's place; otherwise the first one ends the whole.
        """
        if concurrency < 1:
            raise ConfigError(f"map_chat: concurrency: expected 1 or more, got {concurrency}")
        parts, whole = _inputs(prompts)
        return self._map_chat(model, whole, system, options, concurrency, return_errors, self._where, inputs=parts)

    # Bound when first called: importing this module takes neither Parsl nor a loaded kernel.
    @cached_property
    def _chat(self) -> Any:
        return self._bind(_run_chat)

    @cached_property
    def _embed(self) -> Any:
        return self._bind(_run_embed)

    @cached_property
    def _map_chat(self) -> Any:
        return self._bind(_run_map_chat)

    def _bind(self, body: Any) -> Any:
        try:
            from parsl import python_app
        except ImportError:
            raise ConfigError("Parsl is not installed: pip install 'gateway-plugin[apps]'") from None
        return python_app(body, data_flow_kernel=self._dfk, executors=self._executors)


def _inputs(given: Any) -> tuple[list[Any], bool]:
    """Parsl resolves futures in ``inputs``. ``True``: the one member stands for the whole list."""
    if isinstance(given, str | Future):
        return [given], True
    return list(given), False


def _members(inputs: Sequence[Any], whole: bool) -> list[Any]:
    if not whole:
        return list(inputs)
    return [inputs[0]] if isinstance(inputs[0], str) else list(inputs[0])


# --- what runs on the worker ---


class AtGateway(NamedTuple):
    """A gateway, found on the worker: what is ``None`` says the worker's environment."""

    url: str | None = None
    state: str | None = None
    ca: str | None = None


class AtEndpoint(NamedTuple):
    """A Globus Compute endpoint and its function."""

    endpoint: str
    function: str | None = None


Where = AtGateway | AtEndpoint


_making = threading.Lock()


def _through(endpoint: str, function: str | None) -> GlobusClient:
    """One client per endpoint and process, so that its tasks travel together."""
    with _making:  # a cache alone has each of the first callers make its own
        return _cached(endpoint, function)


@lru_cache(maxsize=_CLIENTS)
def _cached(endpoint: str, function: str | None) -> GlobusClient:
    from gateway_plugin.globus import GlobusClient

    return GlobusClient(endpoint, function)


@lru_cache(maxsize=_CLIENTS)
def _connected(where: AtGateway, found: Connection) -> Client:
    from gateway_plugin.client import Client

    return Client(where.url, found.key, where.state, ca=where.ca)


def _client(where: AtGateway) -> Client:
    """One client per gateway and process, so that tasks share connections; found anew, since keys may be renewed."""
    from gateway_plugin.connection import find_gateway

    return _connected(where, find_gateway(where.url, None, where.state, ca=where.ca))


def _run_chat(prompt: Any, model: str, system: str | None, options: dict[str, Any], where: Where) -> str:
    if isinstance(where, AtEndpoint):
        return _through(*where).chat(prompt, model, system=system, **options)
    return _answer(_client(where), prompt, model, system, options)


def _answer(client: Client, prompt: Any, model: str, system: str | None, options: dict[str, Any]) -> str:
    import openai

    from gateway_plugin.client import gateway_error

    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        reply = client.openai.chat.completions.create(model=model, messages=messages, **options)
    except openai.OpenAIError as error:
        raise gateway_error(error, client.url, client.at_hand) from None  # openai's own does not survive pickling
    return chat_words(reply.choices[0].model_dump())


def _run_embed(model: str, whole: bool, where: Where, inputs: Sequence[Any] = ()) -> list[list[float]]:
    import openai

    from gateway_plugin.client import gateway_error

    texts = _members(inputs, whole)
    if isinstance(where, AtEndpoint):
        return _through(*where).embed(texts, model)
    client = _client(where)
    vectors: list[list[float]] = []
    try:
        for start in range(0, len(texts), _EMBED_BATCH):
            reply = client.openai.embeddings.create(model=model, input=texts[start : start + _EMBED_BATCH])
            vectors += [list(item.embedding) for item in sorted(reply.data, key=lambda item: item.index)]
    except openai.OpenAIError as error:
        raise gateway_error(error, client.url, client.at_hand) from None
    return vectors


def _run_map_chat(
    model: str,
    whole: bool,
    system: str | None,
    options: dict[str, Any],
    concurrency: int,
    return_errors: bool,
    where: Where,
    inputs: Sequence[Any] = (),
) -> list[Any]:
    prompts = _members(inputs, whole)
    if isinstance(where, AtEndpoint):
        through = _through(*where)
        return through.map_chat(prompts, model, system=system, return_errors=return_errors, progress=False, **options)
    client = _client(where)

    def one(prompt: Any) -> str | GatewayError:
        try:
            return _answer(client, prompt, model, system, options)
        except GatewayError as error:
            if return_errors:
                return error
            raise

    pool = ThreadPoolExecutor(max_workers=min(concurrency, max(1, len(prompts))), thread_name_prefix="map_chat")
    try:
        return list(pool.map(one, prompts))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_default = Apps()
chat = _default.chat
embed = _default.embed
map_chat = _default.map_chat
