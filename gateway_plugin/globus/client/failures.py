"""What Globus Compute's refusals and failed tasks mean. Pure."""

from __future__ import annotations

from gateway_plugin.errors import (
    AnswerTooLarge,
    EndpointUnavailable,
    Forbidden,
    InvalidKey,
    NotFound,
    PromptTooLarge,
    RateLimited,
    TaskFailed,
)
from gateway_plugin.globus.client.transport import Next, TransportError


def refusal(status: int, code: str, words: str) -> TransportError:
    """What the service's HTTP status means. Pure."""
    said = f"{code}: {words}" if code else words or f"HTTP status {status}"
    if status == 413:
        return TransportError(
            PromptTooLarge(f"The prompt is over Globus Compute's limit of 10 MB ({said})."), Next.SMALLER
        )
    if status == 401:
        return TransportError(
            InvalidKey(
                f"Globus does not know you ({said}). Forget the old login, and the next call asks for a new one: "
                'python -c "from globus_compute_sdk import Client; Client().logout()"; or set '
                "GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET."
            ),
            Next.NOTHING,
        )
    if status == 403:
        return TransportError(
            Forbidden(f"The endpoint does not allow this function, or not for you ({said})."), Next.NOTHING
        )
    if status == 404:
        return TransportError(
            NotFound(f"Globus Compute knows no such endpoint, function or task group ({said})."), Next.NOTHING
        )
    if status == 429:
        return TransportError(RateLimited(f"Globus Compute's rate limit ({said}).", retry_after_s=10.0), Next.AGAIN)
    if status < 500:
        return TransportError(EndpointUnavailable(f"Globus Compute refused the task ({said})."), Next.NOTHING)
    return TransportError(EndpointUnavailable(f"Globus Compute failed ({said}).", retry_after_s=5.0), Next.AGAIN)


def task_failure(remote: str) -> TransportError:
    """What the words of a task that failed mean. Pure."""
    last = next((line.strip() for line in reversed(remote.strip().splitlines()) if line.strip(" \t-|+")), "no reason")
    if "MaxResultSizeExceeded" in remote:
        return TransportError(
            AnswerTooLarge(f"The answer is over Globus Compute's limit of 10 MB a result: {last}"), Next.SMALLER
        )
    if "Command too old" in remote:
        # it was away for over three minutes, and drops what it was told before: computed once, so told again
        words = "The endpoint was away for too long, or its clock and Globus's differ by over three minutes"
        return TransportError(TaskFailed(f"{words}: {last}"), Next.AGAIN)
    if any(word in remote for word in ("WorkerLost", "ManagerLost", "BrokenProcessPool")):
        # the endpoint has tried twice by then: a prompt that kills its worker shall not go on doing so
        return TransportError(
            TaskFailed(f"The endpoint lost the process that worked on this task: {last}"), Next.NOTHING
        )
    return TransportError(TaskFailed(f"The task failed at the endpoint: {last}"), Next.NOTHING)
