"""Requests at times of their own (open loop) or one after the other (closed loop); and the reader of files.

A file has the columns ``arrival_s,model,prompt_tokens,output_tokens,user``, in order of time, gzip or plain. It is read
as it is used, a line at a time.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from gateway_plugin.errors import ConfigError
from serve.simulate.times import CLASSES, Times, times_of

COLUMNS = ("arrival_s", "model", "prompt_tokens", "output_tokens", "user")
REQUESTS_MAX = 20_000_000
"""Of one file. Reading it keeps the present line in memory, a run 8 bytes of each request."""
LINE_MAX = 4096
TOKENS_MAX = 10_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``at``: seconds since the trace began, or since its batch was sent (``Session``)."""

    at: float
    model: str
    prompt_tokens: int
    output_tokens: int
    user: str


@dataclass(frozen=True)
class Session:
    """A closed loop: the requests of a batch are sent, all are awaited, the next batch follows ``think_s`` later."""

    starts: float
    batches: tuple[tuple[Request, ...], ...]
    think_s: float = 0.0


@dataclass(frozen=True)
class Trace:
    """A named workload with the times of its models and the room that it is meant for."""

    name: str
    times: Mapping[str, Times]
    """Model -> its times: the catalog."""
    arrivals: Iterable[Request] = ()
    """In order of time; gone through once by each run."""
    sessions: tuple[Session, ...] = ()
    gpus: int = 16
    """The fleet, unless given otherwise."""
    gpus_per_node: int = 8
    gpu_gib: float = 76.0
    priorities: Mapping[str, int] = field(default_factory=dict)
    """Model -> its priority, 0 for most; higher is more. Only used by a policy with priorities."""
    source: str = ""
    compare_users: bool = False
    """Each user's requests are also run alone on the fleet, for Jain's index: with few users only."""

    def demand(self) -> Counter[str]:
        """Model -> its requests, of arrivals and sessions."""
        closed = (one.model for session in self.sessions for batch in session.batches for one in batch)
        return Counter(one.model for one in self.arrivals) + Counter(closed)


def of_user(trace: Trace, user: str) -> Trace:
    """The requests of one user. Without sessions: theirs may be of several."""
    mine = tuple(request for request in trace.arrivals if request.user == user)
    return replace(trace, arrivals=mine, sessions=(), compare_users=False)


class TraceFile:
    """The requests of a file; each ``iter`` reads it anew. ``known``: the models that it may name; ``None``: any of a
    class in ``serve.simulate.times``.

    Raises ``ConfigError`` while it is gone through: one line with file, line and what was expected.
    """

    def __init__(self, path: Path, known: Mapping[str, Times] | None = None) -> None:
        self.path, self.known = path, known

    def __iter__(self) -> Iterator[Request]:
        line = 0
        try:
            with _opened(self.path) as text:
                lines = csv.reader(_bounded(self.path, text), strict=True)
                header = next(lines, None)
                if header is None or tuple(header) != COLUMNS:
                    said = "nothing" if header is None else repr(",".join(header))
                    raise ConfigError(f"{self.path}, line 1: expected the columns {','.join(COLUMNS)}, found {said}")
                last, line = 0.0, 1
                for count, row in enumerate(lines, start=1):
                    line = lines.line_num
                    request = self._parse(line, row)
                    if count > REQUESTS_MAX:
                        raise ConfigError(f"{self.path}, line {line}: expected at most {REQUESTS_MAX} requests")
                    if request.at < last:
                        raise ConfigError(
                            f"{self.path}, line {line}: expected arrival_s in rising order, found {request.at:g} after "
                            f"{last:g}; sort the file by its first column"
                        )
                    last = request.at
                    yield request
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            expected = "expected CSV in UTF-8, plain or gzip, that can be read to its end"
            raise ConfigError(f"{self.path}, line {line + 1}: {expected}: {error}") from error

    def _parse(self, line: int, row: list[str]) -> Request:
        where = f"{self.path}, line {line}"
        if len(row) != len(COLUMNS):
            raise ConfigError(f"{where}: expected {len(COLUMNS)} values ({','.join(COLUMNS)}), found {len(row)}")
        at, model, prompt, output, user = row
        if self.known is not None:
            if model not in self.known:
                raise ConfigError(f"{where}: unknown model {model!r}; expected one of {_some(self.known)}")
        elif model.split("-", 1)[0] not in CLASSES:
            raise ConfigError(
                f"{where}: unknown model {model!r}; expected a name of a class: {_some(CLASSES)}, then '-'"
            )
        try:
            seconds = float(at)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"{where}: arrival_s: expected seconds of 0 or more, found {at!r}")
        return Request(
            seconds, model, _tokens(where, "prompt_tokens", prompt), _tokens(where, "output_tokens", output), user
        )


def read_trace(path: Path, name: str | None = None, known: Mapping[str, Times] | None = None) -> Trace:
    """The trace in a file. The file is read once for its models, so that all of it is known to be valid.

    Raises:
        ConfigError: one line naming the file, the line and what was expected.
    """
    requests = TraceFile(path, known)
    models = {request.model for request in requests}
    if not models:
        raise ConfigError(f"{path}, line 2: expected at least one request")
    times = known or times_of(models)
    return Trace(name or path.name.removesuffix(".gz").removesuffix(".csv"), times, requests)


def write_trace(requests: Iterable[Request], out: IO[str]) -> int:
    """Write requests in the form that ``read_trace`` reads; returns their number."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for count, one in enumerate(requests, start=1):  # noqa: B007 - the count is the result
        writer.writerow((f"{one.at:.3f}", one.model, one.prompt_tokens, one.output_tokens, one.user))
    return count


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if packed:
            with gzip.open(raw, "rt", encoding="utf-8", newline="") as text:
                yield text
        else:
            yield io.TextIOWrapper(raw, encoding="utf-8", newline="")


def _bounded(path: Path, text: IO[str]) -> Iterator[str]:
    number = 0
    while line := text.readline(LINE_MAX + 1):
        number += 1
        if len(line) > LINE_MAX:
            raise ConfigError(f"{path}, line {number}: expected at most {LINE_MAX} characters")
        yield line


def _tokens(where: str, column: str, text: str) -> int:
    count = int(text) if text.isascii() and text.isdigit() and len(text) <= 8 else -1
    if not 0 <= count <= TOKENS_MAX:
        raise ConfigError(f"{where}: {column}: expected a whole number from 0 to {TOKENS_MAX}, found {text[:40]!r}")
    return count


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
