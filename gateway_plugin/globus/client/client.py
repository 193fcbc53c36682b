"""The client: a site's models through Globus Compute, from a laptop, a notebook or another centre.

    from gateway_plugin.globus import GlobusClient

    with GlobusClient("4b116d3c-1703-4f8f-9f6f-39921e5864df") as site:
        site.chat("What is the capital of France?", "smollm2-135m-instruct", max_tokens=40)
        answers = site.map_chat(prompts, "smollm2-135m-instruct")      # packed into few tasks

Needs ``globus-compute-sdk`` and no port, key or account of the site but a Globus login.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gateway_plugin.api_types import ModelInfo, parse_models
from gateway_plugin.errors import GatewayError, InvalidRequest, ModelNotFound
from gateway_plugin.globus.client import payloads as bodies
from gateway_plugin.globus.client.batches import Limits, Pace
from gateway_plugin.globus.client.endings import error_of
from gateway_plugin.globus.client.lanes import File
from gateway_plugin.globus.client.locate import find_endpoint
from gateway_plugin.globus.client.payloads import Prompt
from gateway_plugin.globus.client.readiness import LOOK_S, wait_until_ready
from gateway_plugin.globus.client.results import gathered, resumed
from gateway_plugin.globus.client.sdk_transport import GlobusTransport
from gateway_plugin.globus.client.sending import Read, Sender, checked_timeout
from gateway_plugin.globus.client.status import EndpointStatus, parse_endpoint
from gateway_plugin.globus.client.transport import Transport

if TYPE_CHECKING:
    from globus_compute_sdk import Client

REQUEST_TIMEOUT_S = 3600.0
"""Of one prompt, from the call to the answer: the model's loading included."""
_EMBED_BATCH = 32


class GlobusClient:
    """One site's models, as a user sees them. Thread-safe.

    Prompts of any thread wait 50 ms for company and travel together, so that a thousand prompts are some tasks and not
    a thousand; each has a future and an error of its own. What fails on the way is sent again under the same key, for
    which the site computes once. ``with`` does not wait at its end for what is still under way.

    Args:
        endpoint_id: of the site's endpoint (``gateway endpoint status`` says it); else ``$GATEWAY_ENDPOINT``.
        function_id: of the site's function; else ``$GATEWAY_FUNCTION``, else what was registered from this machine.
        timeout_s: of one prompt, at most six hours.
        client: Globus Compute's own ``Client``, for another way to log in.
        task_group_id: of what is not a map, a UUID of yours to ``resume`` by; otherwise a new one.
        options: for the endpoint's template, where the site allows any.
        limits: of a pack.
        transport: for tests.

    Raises:
        GatewayError: from every method: what the site's gateway answered, ``EndpointUnavailable``, ``TaskFailed``,
            ``WaitDeadline``; from the constructor ``ConfigError`` where the SDK is missing or an id is none.
    """

    def __init__(
        self,
        endpoint_id: str | None = None,
        function_id: str | None = None,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        task_group_id: str | None = None,
        client: Client | None = None,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        pace: Pace | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.timeout_s = checked_timeout(timeout_s)
        if transport is None:
            self.endpoint_id, function = find_endpoint(endpoint_id, function_id)
            transport = GlobusTransport(self.endpoint_id, function, client, options)
        else:
            self.endpoint_id = endpoint_id or "?"
        self._transport = transport
        self._sender = Sender(transport, limits, pace, task_group_id)
        self.task_group_id = self._sender.group
        """Of everything but maps, which have one each."""

    def __repr__(self) -> str:
        return f"GlobusClient({self.endpoint_id!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go; never waits for answers. What is at the site goes on there, and ``resume`` fetches it."""
        self._sender.dispatcher.close()

    @property
    def tasks_sent(self) -> int:
        """Tasks that this client has sent, the same one twice included."""
        return self._sender.dispatcher.tasks_sent

    # --- one prompt ---
    def chat(
        self,
        prompt: Prompt,
        model: str,
        *,
        system: str | None = None,
        wait: bool = True,
        timeout_s: float | None = None,
        **options: Any,
    ) -> str:
        """The answer's text.

        Args:
            prompt: text, or messages in OpenAI's form.
            system: a system message put before it.
            wait: for a cold model to be loaded; otherwise an error with its ``state`` and ``eta_s`` comes at once.
            timeout_s: until the answer, instead of the client's.
            options: of the chat completion: ``temperature``, ``max_tokens``, ... ``stream`` is refused, with what to
                do instead.
        """
        submitted = self.submit_chat(prompt, model, system=system, wait=wait, timeout_s=timeout_s, **options)
        answer: str = _result(submitted)
        return answer

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
        """A future of ``chat``'s answer. ``cancel()`` is ``True`` only for a prompt that was not sent yet."""
        item = bodies.chat_item(prompt, model, system, options)
        return self._one(item, model, bodies.chat_text, wait, timeout_s)

    def completions(
        self, prompt: str, model: str, *, wait: bool = True, timeout_s: float | None = None, **options: Any
    ) -> str:
        """The text that continues ``prompt``."""
        answer: str = _result(self.submit_completion(prompt, model, wait=wait, timeout_s=timeout_s, **options))
        return answer

    def submit_completion(
        self, prompt: str, model: str, *, wait: bool = True, timeout_s: float | None = None, **options: Any
    ) -> Future[str]:
        """A future of ``completions``' text."""
        item = bodies.completion_item(prompt, model, options)
        return self._one(item, model, bodies.completion_text, wait, timeout_s)

    def embed(
        self,
        texts: str | Sequence[str],
        model: str,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[list[float]]:
        """One vector a text, in order; for a single text a list of one."""
        parts = self.submit_embed(texts, model, wait=wait, timeout_s=timeout_s, **options)
        return [vector for part in parts for vector in _result(part)]

    def submit_embed(
        self,
        texts: str | Sequence[str],
        model: str,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[Future[list[list[float]]]]:
        """Futures of ``embed``'s vectors, one for every 32 texts."""
        members = [texts] if isinstance(texts, str) else list(texts)
        chunks = [members[start : start + _EMBED_BATCH] for start in range(0, len(members), _EMBED_BATCH)]
        items = [bodies.embed_item(chunk, model, options) for chunk in chunks]
        return [self._one(item, model, bodies.vectors, wait, timeout_s) for item in items]

    def submit(
        self, path: str, body: Mapping[str, Any] | None = None, *, wait: bool = True, timeout_s: float | None = None
    ) -> Future[dict[str, Any]]:
        """A future of the whole answer to any request that the site's function takes, such as ``/v1/rerank``; without
        ``body`` a GET.
        """
        if body is None:
            return self._one({"path": path}, path, bodies.whole, wait, timeout_s)
        if body.get("stream"):
            raise InvalidRequest(bodies.NO_STREAMING)
        return self._one(
            {"path": path, "body": dict(body)}, str(body.get("model", path)), bodies.whole, wait, timeout_s
        )

    # --- many prompts ---
    def map_chat(
        self,
        prompts: Iterable[Prompt],
        model: str,
        *,
        system: str | None = None,
        return_errors: bool = False,
        wait: bool = True,
        timeout_s: float | None = None,
        progress: bool | None = None,
        task_group_id: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """The answers' texts, in order. Ctrl-C says how to fetch what was under way.

        Args:
            return_errors: put a ``GatewayError`` in an answer's place; otherwise the first one ends the whole.
            progress: a bar on stderr; by default on a terminal.
            task_group_id: a UUID that you choose and keep, to ``resume`` by should this process be lost.
        """
        group, futures = self._chats(prompts, model, system, wait, timeout_s, task_group_id, options)
        return self._gather(group, futures, return_errors, progress, model)

    def map_file(
        self,
        path: str,
        sha256: str,
        count: int,
        *,
        start: int = 0,
        return_errors: bool = False,
        wait: bool = True,
        timeout_s: float | None = None,
        progress: bool | None = None,
        task_group_id: str | None = None,
    ) -> list[Any]:
        """The whole answers to ``count`` lines, from number ``start``, of a JSONL file that lies at the site already.

        Args:
            path: below the site's input folder; a line is ``{"path": "/v1/chat/completions", "body": {...}}``.
            sha256: of the file: if it is another one by now, nothing is computed.
            task_group_id: as of ``map_chat``.
        """
        group, futures = self._lines(path, sha256, count, start, wait, timeout_s, task_group_id)
        return self._gather(group, futures, return_errors, progress, path)

    def resume(self, task_group_id: str, timeout_s: float | None = None, progress: bool | None = None) -> list[Any]:
        """What came of an earlier map, by whichever process: its answers in order, waiting for those under way.

        In place of an answer that there is not: the prompt's own ``GatewayError``, or ``TaskFailed`` for one that was
        never sent, or whose result Globus Compute no longer has (half an hour after it was ready).

        Raises:
            NotFound: the service knows no such task group, or it is somebody else's.
        """
        return resumed(self._transport, task_group_id, self._budget(timeout_s), progress)

    # --- the site ---
    def models(self, timeout_s: float = LOOK_S) -> list[ModelInfo]:
        """Every model of the site's catalog with its state."""
        answer = _result(self.submit(bodies.MODELS, timeout_s=timeout_s))
        return parse_models(answer)

    def model(self, name: str, timeout_s: float = LOOK_S) -> ModelInfo:
        """One model, by name or alias. Raises ``ModelNotFound``."""
        models = self.models(timeout_s)
        found = next((model for model in models if name == model.name or name in model.aliases), None)
        if found is None:
            raise ModelNotFound(name, tuple(model.name for model in models))
        return found

    def status(self) -> EndpointStatus:
        """What Globus Compute knows of the endpoint."""
        return parse_endpoint(self._transport.endpoint())

    def wait_until_ready(self, model: str, timeout_s: float = 1800.0, *, poll_s: float = 3.0) -> ModelInfo:
        """Have ``model`` loaded, and return when it is ready.

        Raises:
            ModelNotFound: the catalog has no such model.
            ModelUnavailable: its engine fails to start; the message ends with the engine's own last words.
            WaitDeadline: not ready within ``timeout_s`` seconds, every look at it included.
        """
        return wait_until_ready(lambda within_s: self.model(model, within_s), self._touch, timeout_s, poll_s)

    def _touch(self, model: ModelInfo, timeout_s: float) -> None:
        """Ask for one token without waiting: that has the model loaded."""
        if model.task == "embed":
            item = bodies.embed_item(["ready?"], model.name, {})
        else:
            item = bodies.chat_item("ready?", model.name, None, {"max_tokens": 1})
        try:
            _result(self._one(item, model.name, bodies.whole, False, timeout_s))
        except GatewayError as error:
            if error.status != 503:
                raise

    # --- on the way ---
    def _one(self, item: Mapping[str, Any], model: str, read: Read, wait: bool, timeout_s: float | None) -> Future[Any]:
        return self._sender.one(item, model, read, wait, self._budget(timeout_s))

    def _budget(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)

    def _chats(
        self,
        prompts: Iterable[Prompt],
        model: str,
        system: str | None,
        wait: bool,
        timeout_s: float | None,
        group: str | None,
        options: Mapping[str, Any],
    ) -> tuple[str, list[Future[Any]]]:
        items = [bodies.chat_item(prompt, model, system, options) for prompt in prompts]
        return self._sender.many(items, model, bodies.chat_text, wait, self._budget(timeout_s), None, group)

    def _lines(
        self, path: str, sha256: str, count: int, start: int, wait: bool, timeout_s: float | None, group: str | None
    ) -> tuple[str, list[Future[Any]]]:
        items = [{"line": number} for number in range(start, start + count)]
        file = File(path, sha256, start)
        return self._sender.many(items, path, bodies.whole, wait, self._budget(timeout_s), file, group)

    def _gather(
        self, group: str, futures: list[Future[Any]], return_errors: bool, progress: bool | None, words: str
    ) -> list[Any]:
        try:
            return gathered(group, futures, return_errors, progress, words)
        finally:
            self._sender.release(group)


def _result(future: Future[Any]) -> Any:
    try:
        wait_for([future])
    except BaseException:  # Ctrl-C above all
        future.cancel()
        raise
    if (error := error_of(future)) is not None:
        raise error
    return future.result()
