"""The way to an endpoint through Globus Compute's SDK.

What the SDK's ``Executor`` does that a client must know (4.19; each is a test in tests/globus/):

- any failed submission ends it, and cancels what was queued in it: it is made anew for the next one;
- it coalesces tasks into one submission of any size: so ``batch_size=1``, a task is a submission here;
- its result watcher and its exit hook wait for results without end: ``release`` and ``close`` make them let go;
- every executor made later, anybody's, takes over the task group of the last one: ours are taken back out of there.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from gateway_plugin.errors import (
    AnswerTooLarge,
    ConfigError,
    EndpointUnavailable,
    Forbidden,
    GatewayError,
    InvalidKey,
    NotFound,
    PromptTooLarge,
    RateLimited,
    TaskFailed,
)
from gateway_plugin.globus.client.transport import Next, TransportError

if TYPE_CHECKING:
    from globus_compute_sdk import Client, Executor

_STATUS_BATCH = 64
"""Tasks a request, where a group is looked up: these requests are not paced, and 20 are allowed within 10 s."""


class SdkTransport:
    """Globus Compute, with JSON in both directions and nothing else.

    Args:
        endpoint_id: of the site's endpoint.
        function_id: of the site's function, as registered.
        client: the SDK's, for another service or another way to log in. Its serializer is replaced.
        options: of the endpoint's template (``user_endpoint_config``), where the site allows any.

    Raises:
        ConfigError: the SDK is not installed.
        EndpointUnavailable: the service does not answer.
    """

    def __init__(
        self,
        endpoint_id: str,
        function_id: str,
        client: Client | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._endpoint = _uuid(endpoint_id, "endpoint")
        self._function = _uuid(function_id, "function")
        try:
            from globus_compute_sdk import Client as SdkClient
            from globus_compute_sdk.serialize import ComputeSerializer, JSONData, PureSourceTextInspect
        except ImportError:
            raise ConfigError("globus-compute-sdk is not installed: pip install 'gateway-plugin[globus]'") from None
        self._options = dict(options or {})
        self._result_serializers = [JSONData]
        try:
            # here, not in a thread: it may ask the user to log in
            self._client = client if client is not None else SdkClient()
        except Exception as error:
            raise self.failure(error).error from error
        self._client.fx_serializer = ComputeSerializer(
            strategy_data=JSONData, allowed_deserializer_types=[JSONData, PureSourceTextInspect]
        )
        # It warns where Python or dill differ there; what travels is JSON.
        self._client._log_version_mismatch = lambda details: None
        self._lock = threading.Lock()
        self._executors: dict[str, Executor] = {}

    def submit(self, group: str, request: Mapping[str, Any]) -> Future[Any]:
        with self._lock:
            executor = self._executor(group)
        submitted: Future[Any] = executor.submit_to_registered_function(self._function, args=(dict(request),))
        return submitted

    def _executor(self, group: str) -> Executor:
        from globus_compute_sdk import Executor

        found = self._executors.get(group)
        if found is not None and not found._stopped:  # there is no public way to ask
            return found
        before = Executor._default_task_group_id
        made = Executor(
            endpoint_id=self._endpoint,
            client=self._client,
            task_group_id=group,
            user_endpoint_config=self._options or None,
            batch_size=1,
            api_burst_limit=8,
            api_burst_window_s=1,
            result_serializers=self._result_serializers,
        )
        Executor._default_task_group_id = before
        self._executors[group] = made
        return made

    def failure(self, error: BaseException) -> TransportError:
        """What an error of the SDK means: (1) ours, (2) never sent, (3) a task that failed, (4) the service's refusal,
        (5) everything else: a connection that broke.
        """
        from globus_compute_sdk.errors import TaskExecutionFailed
        from globus_sdk import GlobusAPIError

        if isinstance(error, TransportError):  # (1)
            return error
        if isinstance(error, CancelledError):  # (2)
            return TransportError(EndpointUnavailable("The task was not sent: an earlier one was refused."), Next.AGAIN)
        if isinstance(error, TaskExecutionFailed):  # (3)
            return task_failure(error.remote_data)
        if isinstance(error, GlobusAPIError):  # (4)
            return refusal(error.http_status, str(error.code or ""), error.message or "")
        words = f"{type(error).__name__}: {error}"  # (5)
        return TransportError(EndpointUnavailable(f"Globus Compute cannot be reached ({words})."), Next.AGAIN)

    def tasks(self, group: str) -> list[Future[Any]]:
        self.release(group)  # what a living watcher still expects would be left out
        with self._lock:
            executor = self._executor(str(_uuid(group, "task group")))
        executor.batch_size = _STATUS_BATCH
        try:
            return list(executor.reload_tasks())
        except Exception as error:
            raise self.failure(error).error from error
        finally:
            executor.batch_size = 1

    def endpoint(self) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self._client.get_endpoint_status(self._endpoint)
        except Exception as error:
            raise self.failure(error).error from error
        return found

    def release(self, group: str) -> None:
        with self._lock:
            executor = self._executors.pop(group, None)
        if executor is not None:
            _end(executor)

    def close(self) -> None:
        with self._lock:
            executors, self._executors = list(self._executors.values()), {}
        for executor in executors:
            _end(executor)


def _end(executor: Executor) -> None:
    from globus_compute_sdk.sdk.executor import _RESULT_WATCHERS  # Parsl's executor ends it the same way

    executor.shutdown(wait=False, cancel_futures=True)
    # One that gave up stays there, where reload_tasks() would have it watch again.
    watcher = _RESULT_WATCHERS.pop(executor.task_group_id, None)
    if watcher is not None:
        watcher.shutdown(wait=False, cancel_futures=True)


def _uuid(text: str, what: str) -> str:
    try:
        return str(uuid.UUID(str(text)))
    except ValueError:
        raise ConfigError(f"An {what} id looks like 4b116d3c-1703-4f8f-9f6f-39921e5864df, got {text!r}.") from None


def refusal(status: int, code: str, words: str) -> TransportError:
    """What the service's HTTP status means. Pure."""
    said = f"{code}: {words}" if code else words or f"HTTP status {status}"
    error: GatewayError
    match status:
        case 413:
            error = PromptTooLarge(f"The prompt is over Globus Compute's limit of 10 MB ({said}).")
            return TransportError(error, Next.SMALLER)
        case 401:
            error = InvalidKey(
                f"Globus refused your login ({said}). Remove the old one, and the next call asks for a new one: "
                'python -c "from globus_compute_sdk import Client; Client().logout()"; or set '
                "GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET."
            )
        case 403:
            error = Forbidden(f"The endpoint does not allow this function, or not for you ({said}).")
        case 404:
            error = NotFound(f"Globus Compute knows no such endpoint, function or task group ({said}).")
        case 429:
            error = RateLimited(f"Globus Compute's rate limit ({said}).", retry_after_s=10.0)
        case _ if status < 500:
            error = EndpointUnavailable(f"Globus Compute refused the task ({said}).")
        case _:
            error = EndpointUnavailable(f"Globus Compute failed ({said}).", retry_after_s=5.0)
    return TransportError(error, Next.AGAIN if status == 429 or status >= 500 else Next.NOTHING)


def task_failure(remote: str) -> TransportError:
    """What the traceback of a task that failed means. Pure."""
    last = next((line.strip() for line in reversed(remote.strip().splitlines()) if line.strip(" \t-|+")), "no reason")
    if "MaxResultSizeExceeded" in remote:
        too_large = AnswerTooLarge(f"The answer is over Globus Compute's limit of 10 MB a result: {last}")
        return TransportError(too_large, Next.SMALLER)
    if "Command too old" in remote:
        # it was away for over three minutes, and drops earlier commands; computed once per key, so send it again
        words = "The endpoint was away for too long, or its clock and Globus's differ by over three minutes"
        return TransportError(TaskFailed(f"{words}: {last}"), Next.AGAIN)
    if any(word in remote for word in ("WorkerLost", "ManagerLost", "BrokenProcessPool")):
        # the endpoint has tried twice by then: do not repeat a prompt that kills its worker
        return TransportError(TaskFailed(f"The endpoint lost the process of this task: {last}"), Next.NOTHING)
    return TransportError(TaskFailed(f"The task failed at the endpoint: {last}"), Next.NOTHING)
