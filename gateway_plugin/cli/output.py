"""Output of the command line: tables for people, JSON for programs, errors in one line, progress on stderr.

All output goes through here, and so through ``plain``: much of it is untrusted text (answers of models, output of
engines and schedulers, logs).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from gateway_plugin.errors import GatewayError
from gateway_plugin.plain import PlainStream, plain

if TYPE_CHECKING:
    from gateway_plugin.api_types import ModelInfo

TIMES = re.compile(r"[\d.]+ ((s|min|h|d)\b|%)")
"""The parts of a status line that change while the state does not."""

Command = TypeVar("Command", bound=Callable[..., Any])

_COLOURS = {
    **dict.fromkeys(("ready", "running", "ok", "open", "up", "active", "serving"), "green"),
    **dict.fromkeys(
        ("loading", "fetching", "stalled", "starting", "waiting", "draining", "degraded", "warn", "pending", "queued"),
        "yellow",
    ),
    **dict.fromkeys(("asked", "adopting", "leaving", "ending"), "yellow"),
    "asleep": "cyan",
    **dict.fromkeys(("failed", "dead", "fail", "silent", "down", "lost"), "red"),
}


@dataclass
class Settings:
    """Options of one run of ``gateway``."""

    state: Path
    """State folder: that of ``--state``, else the default."""
    explicit_state: bool = False
    """``--state`` was given: it takes precedence over ``GATEWAY_URL``."""
    json: bool = False


def settings() -> Settings:
    """Settings of the running command."""
    found = click.get_current_context().find_root().obj
    if not isinstance(found, Settings):
        raise TypeError("the group has not run")
    return found


def _set_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and isinstance(context.find_root().obj, Settings):
        context.find_root().obj.json = True


def json_option(command: Command) -> Command:
    """The option ``--json``."""
    return click.option(
        "--json", is_flag=True, expose_value=False, is_eager=True, callback=_set_json, help="Print JSON, for programs."
    )(command)


def show(document: Any, human: Callable[[], None]) -> None:
    """Print ``document`` as JSON, or call ``human``, which prints it for people."""
    if settings().json:
        put_json(document, indent=2)
    else:
        human()


def put(words: str, *, err: bool = False) -> None:
    """Print a line, on stderr with ``err``."""
    click.echo(plain(words), err=err)


def put_json(document: Any, indent: int | None = None, *, err: bool = False) -> None:
    """Print JSON. All characters but ASCII are escaped, and so are control characters."""
    click.echo(json.dumps(document, indent=indent, default=str).replace("\x7f", "\\u007f"), err=err)


def say(words: str) -> None:
    """Print one line for people; nothing with ``--json``."""
    if not settings().json:
        put(words)


class Answer:
    """A model's answer on stdout, as it arrives: plain on a terminal; elsewhere it is data, and left unchanged."""

    def __init__(self) -> None:
        self._stream = PlainStream() if sys.stdout.isatty() else None

    def write(self, words: str) -> None:
        """Print the next piece."""
        self._put(words if self._stream is None else self._stream.feed(words))

    def end(self) -> None:
        """End the line after the last piece."""
        self._put(("" if self._stream is None else self._stream.end()) + "\n")

    def _put(self, words: str) -> None:
        # color: click would strip colours when writing to a pipe. Half a surrogate pair cannot be encoded.
        click.echo(words.encode(errors="replace").decode(), nl=False, color=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], whole: Collection[str] = ()) -> None:
    """Print a table on stdout; ``None`` is an empty cell, states are coloured. ``whole``: columns never folded."""
    put_parts([make_table(columns, rows, whole=whole)])


def put_parts(parts: Iterable[Any]) -> None:
    """Print what ``rich`` can render: tables, and ``text``."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # a pipe has no width: do not fold what a program may read
    for part in parts:
        console.print(part)


def text(words: str) -> Any:
    """Text for ``rich`` in which it finds no markup, such as a link."""
    from rich.text import Text

    return Text(plain(words))


def make_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    whole: Collection[str] = (),
) -> Any:
    """The ``rich`` table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=None if title is None else text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    for column in columns:
        made.add_column(text(column), no_wrap=column in whole)
    for row in rows:
        cells = ["" if cell is None else plain(str(cell)) for cell in row]
        made.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in cells))
    return made


def duration(seconds: float | None) -> str:
    """For people: ``40 s``, ``12 min``, ``3.5 h``, ``4.0 d``; empty for ``None``."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"


def outlook(model: ModelInfo) -> str:
    """Reason and expected wait of a model that is not ready: ``job 7 waits: Resources, ready in about 40 s``."""
    words = [model.reason] if model.reason else []
    words += [f"ready in about {duration(model.eta_s)}"] if model.eta_s is not None else []
    return ", ".join(words)


def report_error(error: GatewayError, as_json: bool) -> None:
    """``error: message`` on stderr; with ``--json`` the body in OpenAI's form on stdout."""
    if as_json:
        put_json(error.body())
    else:
        put(f"error: {error.message}", err=True)


class Steps:
    """Steps in progress: live on a terminal, else one line per change. Writes to stderr."""

    def __init__(self, title: str, quiet: bool | None = None) -> None:
        from rich.console import Console

        self._title = title
        self._console = Console(stderr=True, highlight=False)
        self._live: Any = None
        self._last: dict[str, tuple[str, str]] = {}
        self._quiet = settings().json if quiet is None else quiet

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hide the display while another program uses the terminal."""
        if self._live is None:
            yield
            return
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def update(self, rows: Sequence[tuple[str, str, str]], elapsed_s: float) -> None:
        """Show ``(what, phase, note)`` rows, their state after ``elapsed_s`` seconds."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(make_table((self._title, f"{elapsed_s:.0f} s", ""), rows))
            return
        for what, phase, note in rows:
            said = (phase, TIMES.sub("", note))
            if self._last.get(what) != said:
                self._last[what] = said
                words = f"{elapsed_s:6.1f} s  {what}: {phase}{f' ({note})' if note else ''}"
                put(words, err=True)


def read_terminal() -> bool:
    """Whether a person types on stdin."""
    return sys.stdin.isatty()
