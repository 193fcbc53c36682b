"""How the futures of requests end: with an answer, an error, at their deadline, or cancelled; and at the program's end.
Each ends once.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future, InvalidStateError
from typing import Any

from gateway_plugin.channel import Channel
from gateway_plugin.errors import EndpointUnavailable, GatewayError, WaitDeadline
from gateway_plugin.globus.client.batches import Batch, BatchKey


def begin(future: Future[Any]) -> bool:
    """Whether the request is still wanted; from now on ``cancel()`` returns ``False``."""
    return future.set_running_or_notify_cancel()


def withdraw(future: Future[Any]) -> None:
    """Cancel it, if it has not begun."""
    if future.cancel():
        future.set_running_or_notify_cancel()


def settle(future: Future[Any], found: object) -> None:
    """End it with ``found``, a ``GatewayError`` or a result, unless it has ended at its deadline or was cancelled."""
    try:
        if isinstance(found, GatewayError):
            future.set_exception(found)
        else:
            future.set_result(found)
    except InvalidStateError:
        return  # the caller has the earlier outcome


def abandon(batch: Batch) -> None:
    """End its requests: the client no longer waits for their answers."""
    error = EndpointUnavailable(
        f"The client was closed before the answer came. It may still be fetched: resume('{batch.of.group}')."
    )
    for call in batch.calls:
        settle(call.future, error)


def past_deadline(key: BatchKey, why: str) -> WaitDeadline:
    """The error of a request whose time is up."""
    return WaitDeadline(f"No answer of '{key.model}' through the endpoint within {key.timeout_s:g} s: {why}.")


def end_late(batch: Batch, now: float) -> bool:
    """End those requests of ``batch`` whose time is up. Whether all of them have ended."""
    if batch.next_deadline > now:
        return False
    why = f"its task is at the endpoint, or lost; resume('{batch.of.group}') fetches what came of it"
    for call in batch.calls:
        if call.deadline <= now and not call.future.done():
            settle(call.future, past_deadline(batch.of, why))
    return all(call.future.done() for call in batch.calls)


_open: weakref.WeakSet[Channel] = weakref.WeakSet()
_lock = threading.Lock()
_watch: threading.Thread | None = None


def close_at_exit(client: Channel) -> None:
    """Close ``client``, if it is still there, once the main thread has ended: otherwise the SDK waits at exit for
    results, for lost ones without end.

    ``atexit`` comes too late: it runs after the threads that wait for results were joined.
    """
    global _watch
    with _lock:
        _open.add(client)
        if _watch is None:
            _watch = threading.Thread(target=_close_all, name="globus-client-exit")
            _watch.start()


def _close_all() -> None:
    threading.main_thread().join()
    with _lock:
        clients = list(_open)
    for client in clients:
        client.close()
