"""Parsl apps: language models as tasks of a workflow.

    from gateway_plugin.apps import chat, embed, map_chat

    summary = chat("Summarise: ...", "smollm2-135m-instruct", max_tokens=60)   # an AppFuture of the answer's text
    vectors = embed([text, summary], "all-minilm-l6-v2")                       # takes futures as inputs
    answers = map_chat(prompts, "smollm2-135m-instruct")                       # one task, many requests at a time

A task finds the gateway where it runs: ``$GATEWAY_URL`` and ``$GATEWAY_API_KEY`` in the worker's environment, else the
state folder of a gateway on this machine or file system. Neither URL nor key travels with a task unless you name a URL.
Errors are ``GatewayError``s, raised by the future's ``result()``. An answer that ended at ``max_tokens`` before its
first word (all of them went into thinking) is one, too: ``NothingSaid``.

The apps of ``Apps(endpoint=ID)`` use a site elsewhere, through Globus Compute: each worker process is one client of
that endpoint. Tasks that run in one process at a time (threads: Parsl's ``ThreadPoolExecutor``) travel packed; a worker
of ``HighThroughputExecutor`` runs one at a time, so there each ``chat`` is a Globus task: take ``map_chat``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gateway_plugin.api_types import Prompt
from gateway_plugin.errors import ConfigError

if TYPE_CHECKING:
    from parsl.app.futures import AppFuture
    from parsl.dataflow.dflow import DataFlowKernel

    from gateway_plugin.client import Client
    from gateway_plugin.connection import Connection

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

    Raises ``ConfigError`` for an endpoint together with a gateway's ``url``, ``state`` or ``ca``.
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
            raise ConfigError("Apps: endpoint: a gateway's url, state or ca cannot be given with it.")
        self._executors: Any = executors if executors == "all" else list(executors)
        folder, authority = (None if path is None else str(path) for path in (state, ca))
        self._place = Place(url, folder, authority, endpoint, function)
        self._dfk = data_flow_kernel
        self._bound: dict[Callable[..., Any], Any] = {}

    def chat(self, prompt: Prompt | Future[Any], model: str, *, system: str | None = None, **options: Any) -> AppFuture:
        """An ``AppFuture`` of the answer's text.

        Args:
            prompt: text, messages, or a future of either.
            system: a system message put before it.
            options: as of ``Client.chat``: ``temperature``, ``max_tokens``, ``extra_body``, ``timeout_s``, ...
        """
        return self._app(_run_chat)(prompt, model, {"system": system, **options}, self._place)

    def embed(self, texts: str | Sequence[str | Future[str]] | Future[Any], model: str) -> AppFuture:
        """An ``AppFuture`` of one vector (a list of floats) per text, in order; for a single text, of a list of one.

        Args:
            texts: a text, a list whose members may be futures, or a future of a list.
        """
        parts, whole = _inputs(texts)
        return self._app(_run_embed)(model, whole, self._place, inputs=parts)

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
        Through an endpoint all of them travel packed.

        Better than one ``chat`` per prompt for many short prompts: the engine batches them, Parsl carries one task.

        Args:
            prompts: a list whose members may be futures, or a future of a list.
            return_errors: put a ``GatewayError`` in an answer's place; otherwise the first one ends the whole.
        """
        if concurrency < 1:
            raise ConfigError(f"map_chat: concurrency: expected 1 or more, got {concurrency}")
        parts, whole = _inputs(prompts)
        chosen = {"system": system, "concurrency": concurrency, "return_errors": return_errors, **options}
        return self._app(_run_map_chat)(model, whole, chosen, self._place, inputs=parts)

    def _app(self, body: Callable[..., Any]) -> Any:
        """Bound when first called: importing this module takes neither Parsl nor a loaded kernel."""
        if body not in self._bound:
            try:
                from parsl import python_app
            except ImportError:
                raise ConfigError("Parsl is not installed: pip install 'gateway-plugin[apps]'") from None
            self._bound[body] = python_app(body, data_flow_kernel=self._dfk, executors=self._executors)
        return self._bound[body]


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


class Place(NamedTuple):
    """Which gateway; what is ``None``, the worker's environment says."""

    url: str | None = None
    state: str | None = None
    ca: str | None = None
    endpoint: str | None = None
    function: str | None = None


_making = threading.Lock()


def _client(place: Place) -> Client:
    """One client per gateway and process, so that tasks share connections, or travel together through an endpoint. Over
    HTTP it is made anew when the worker's key changes.
    """
    found = None
    if place.endpoint is None:
        from gateway_plugin.connection import find_gateway

        found = find_gateway(place.url, None, place.state, ca=place.ca)
    with _making:  # the cache alone has each of the first callers make its own
        return _connected(place, found)


@lru_cache(maxsize=_CLIENTS)
def _connected(place: Place, found: Connection | None) -> Client:
    from gateway_plugin.client import Client

    if found is None:
        return Client(endpoint=place.endpoint, function=place.function)
    return Client(place.url, found.key, place.state, ca=place.ca)


def _run_chat(prompt: Any, model: str, options: dict[str, Any], place: Place) -> str:
    return _client(place).chat(prompt, model, **options)


def _run_embed(model: str, whole: bool, place: Place, inputs: Sequence[Any] = ()) -> list[list[float]]:
    return _client(place).embed(_members(inputs, whole), model)


def _run_map_chat(
    model: str, whole: bool, options: dict[str, Any], place: Place, inputs: Sequence[Any] = ()
) -> list[Any]:
    return _client(place).map_chat(_members(inputs, whole), model, progress=False, **options)


_default = Apps()
chat = _default.chat
embed = _default.embed
map_chat = _default.map_chat
