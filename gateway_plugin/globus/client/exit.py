"""Let clients go when the program ends: otherwise the SDK waits at exit for results, lost ones for ever."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Without waiting."""
        ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()
_lock = threading.Lock()
_watch: threading.Thread | None = None


def close_at_exit(client: Closable) -> None:
    """Close ``client``, if it is still there, once the main thread has ended.

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
