"""Runs side by side in processes, which end with this one: also at Ctrl-C."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from gateway_plugin.errors import ConfigError

Given = TypeVar("Given")
Found = TypeVar("Found")


def each(work: Callable[[Given], Found], items: Sequence[Given], jobs: int) -> Iterator[tuple[Given, Found]]:
    """``work`` of each item, in the order in which they end; one at a time: here, in their own order."""
    if jobs == 1 or len(items) < 2:
        yield from ((item, work(item)) for item in items)
        return
    workers = ProcessPoolExecutor(min(jobs, len(items)), initializer=_leave_interrupts_to_the_parent)
    try:
        running: dict[Future[Found], Given] = {workers.submit(work, item): item for item in items}
        yield from ((running[done], done.result()) for done in as_completed(running))
    except BrokenProcessPool:
        raise ConfigError(
            "a simulation's process ended early; if memory ran out, give a smaller --jobs or fewer traces"
        ) from None
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        workers.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
