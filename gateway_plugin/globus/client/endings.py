"""How prompts' futures end: with an answer, an error, at their deadline, or taken back. Each ends once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from gateway_plugin.errors import EndpointUnavailable, GatewayError, TaskFailed, WaitDeadline
from gateway_plugin.globus.client.lanes import LaneKey, Pack


def begin(future: Future[Any]) -> bool:
    """Whether the prompt is still wanted; from now on ``cancel()`` says that it comes too late."""
    return future.set_running_or_notify_cancel()


def withdraw(future: Future[Any]) -> None:
    """Cancel it, if it has not begun."""
    if future.cancel():
        future.set_running_or_notify_cancel()


def error_of(future: Future[Any]) -> BaseException | None:
    """The error of one that has ended: it is only taken back unasked where its client is closed."""
    if future.cancelled():
        return EndpointUnavailable("The client was closed before this prompt was sent.")
    return future.exception()


def settle(future: Future[Any], found: object) -> None:
    """End it with ``found``, a ``GatewayError`` or what its owner wants, unless it has ended."""
    try:
        if isinstance(found, GatewayError):
            future.set_exception(found)
        else:
            future.set_result(found)
    except InvalidStateError:
        return  # it ended with its deadline, or was cancelled: that is what its owner was told


def read(wanted: Callable[[dict[str, Any]], Any], body: dict[str, Any]) -> object:
    """What its owner wants of the answer, or why that is not in it (``NothingSaid``, ``TaskFailed``)."""
    try:
        return wanted(body)
    except GatewayError as error:
        return error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        words = str(error)[:200]
        return TaskFailed(f"The answer has another form than expected ({type(error).__name__}: {words}).")


def close(pack: Pack) -> None:
    """Nobody listens any more."""
    error = EndpointUnavailable(
        f"The client was closed before the answer came. It may still be fetched: resume('{pack.lane.group}')."
    )
    for call in pack.calls:
        settle(call.future, error)


def late(lane: LaneKey, why: str) -> WaitDeadline:
    """A prompt's time is up."""
    return WaitDeadline(f"No answer of '{lane.model}' through the endpoint within {lane.timeout_s:g} s: {why}.")


def end_late(pack: Pack, now: float) -> bool:
    """End those futures of ``pack`` whose time is up. Whether nobody waits for it any more."""
    if first_deadline(pack) > now:
        return False
    why = f"its task is at the endpoint, or lost; resume('{pack.lane.group}') fetches what came of it"
    for call in pack.calls:
        if call.deadline <= now and not call.future.done():
            settle(call.future, late(pack.lane, why))
    return all(call.future.done() for call in pack.calls)


def first_deadline(pack: Pack) -> float:
    """When the next of its prompts ends for want of time; infinite where none waits."""
    return min((call.deadline for call in pack.calls if not call.future.done()), default=float("inf"))
