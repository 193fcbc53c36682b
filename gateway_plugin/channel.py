"""What the client needs of a way to a gateway (HTTP, Globus Compute), and how it collects many answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from gateway_plugin.errors import GatewayError

WAIT_HEADER = "x-gateway-wait"
"""For how many seconds a request waits for its model; ``0``: not at all."""


class Item(NamedTuple):
    """One request and how to send it."""

    path: str
    """Such as ``/v1/chat/completions``."""
    body: Mapping[str, Any] | None
    """``None``: a GET."""
    read: Callable[[dict[str, Any]], Any]
    """What the caller wants of the answer's body."""
    wait: bool
    """Whether it waits for a model that is not ready."""
    timeout_s: float
    headers: Mapping[str, str] | None = None
    """More of them, with names in lower case; over HTTP only."""


class File(NamedTuple):
    """Lines of a JSONL file at a site, from number ``first``."""

    path: str
    sha256: str
    first: int = 0


Map = tuple[str, list[Future[Any]]]
"""The name of a map's group, and the futures of its answers."""


class Channel(Protocol):
    """One way to one gateway. Thread-safe."""

    url: str
    """What people are shown."""
    base_url: str
    """What ``httpx`` and ``openai`` put before a path."""
    key: str
    at_hand: bool
    """Whether this is the machine and the user of the gateway."""
    streams: bool
    """Whether an answer can come piece by piece."""
    retries: int
    """Which ``openai`` makes; 0 where the channel repeats by itself."""
    poll_s: float
    """Between two looks at a model."""
    look_s: float
    """What a look takes: with less time left there is none."""
    answer_s: float
    """Timeout of everything but inference."""
    longest_s: float
    """Of ``timeout_s``."""
    texts: int
    """Of one embeddings request."""

    def options(self, *, asynchronous: bool) -> dict[str, Any]:
        """Arguments of ``httpx.Client`` or ``AsyncClient``."""

    def submit(self, item: Item) -> Future[Any]:
        """Send one request. The future ends with what ``item.read`` returns or a ``GatewayError``."""

    def map(
        self, items: Sequence[Item], label: str, concurrency: int, group: str | None, file: File | None = None
    ) -> Map:
        """Send many, of one ``label`` (the model). ``file``: they are lines of it."""

    def release(self, group: str) -> None:
        """End what is left of a map."""

    def resume(self, group: str, timeout_s: float, progress: bool | None) -> list[Any]:
        """The answers of an earlier map, in order."""

    def how_to_go_on(self, group: str) -> str:
        """What becomes of the rest of a map that was interrupted, for people."""

    def unreachable(self, error: Exception) -> GatewayError:
        """What a failed connection means."""

    def closed(self) -> GatewayError:
        """The error of a request that ended because the client was closed."""

    def close(self) -> None:
        """Let go; never waits for answers."""


def error_of(future: Future[Any], channel: Channel) -> BaseException | None:
    """The error of a future that has ended. Only closing the client cancels one that the caller did not."""
    return channel.closed() if future.cancelled() else future.exception()


def result_of(future: Future[Any], channel: Channel) -> Any:
    """Wait for one answer. Interrupted (Ctrl-C), the request is cancelled as far as it can be."""
    try:
        wait_for([future])
    except BaseException:
        future.cancel()
        raise
    if (error := error_of(future, channel)) is not None:
        raise error
    return future.result()


def gathered(
    channel: Channel, group: str, futures: list[Future[Any]], return_errors: bool, progress: bool | None, words: str
) -> list[Any]:
    """The answers of a map, in order. The first error ends it, unless errors may stand in their answers' places."""
    try:
        with progress_bar(words, len(futures), progress) as advance:
            for future in as_completed(futures):
                advance()
                if not return_errors and (error := error_of(future, channel)):
                    raise error
    except KeyboardInterrupt:
        answered = sum(future.done() for future in futures)
        words = f"interrupted: {answered} of {len(futures)} prompts are answered. {channel.how_to_go_on(group)}"
        print(words, file=sys.stderr)
        raise
    finally:
        channel.release(group)
    return [error_of(future, channel) or future.result() for future in futures]


@contextmanager
def progress_bar(words: str, total: int, show: bool | None = None) -> Iterator[Callable[[], None]]:
    """A bar on stderr; yields a function to call for each that is done. ``show``: on a terminal where ``None``."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(words, total=total)
        yield lambda: progress.advance(bar)
