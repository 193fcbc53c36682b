"""The usage log as a trace for ``python -m serve.simulate``: ``arrival_s,model,prompt_tokens,output_tokens,user``.

The edge counts bytes, not tokens, so tokens are estimates. It writes a request's line when the request ends, so lines
are sorted here by the time at which it came.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError

COLUMNS = ("arrival_s", "model", "prompt_tokens", "output_tokens", "user")
CLASSES = {"8b": (1, 22), "vl": (1, 26), "32b": (1, 70), "70b": (4, 40), "moe": (8, 70)}
"""The simulator's classes: GPUs, and GiB on each."""

_BYTES_PER_TOKEN = 4
_ASKED_BYTES = 500
"""Of a request, what is no prompt: its head, and the frame of its JSON."""
_ANSWERED_BYTES = 700
"""The same of an answer that is no stream."""
_CHUNK_BYTES = 240
"""Of a stream, the event for one token."""
_STREAM_MS = 100
"""An answer whose bytes come over more than this time, and a tenth of all, is a stream."""
_WITHOUT_PROMPT = ("/audio/transcriptions", "/audio/translations", "/images/edits")
"""What they are sent is a file, hardly any text."""
_NO_TEXT = "/embeddings /rerank /score /pooling tokenize /audio/speech /images/generations /images/edits"
_WITHOUT_OUTPUT = tuple(_NO_TEXT.split())


@dataclass(frozen=True, slots=True)
class Used:
    """One request of the log."""

    time: float
    """When it came, seconds since 1970."""
    model: str
    prompt_tokens: int
    output_tokens: int
    user: str


@dataclass
class Log:
    """The requests of several files, and how many of their lines are unreadable (cut off, say)."""

    requests: list[Used]
    unreadable: int = 0


def log_files(current: Path) -> list[Path]:
    """``usage.jsonl`` and what a rotation left beside it (``.1``, ``.2.gz``, ``-20261101``)."""
    return sorted(path for path in current.parent.glob(f"{current.name}*") if path.is_file())


def read_log(paths: Iterable[Path], since: float = 0.0) -> Log:
    """Every request for a model, in the order in which they came. Raises ``ConfigError`` for an unreadable file.

    Left out is what the edge refused (4xx): it was no work. A client that left was demand all the same.
    """
    found = Log([])
    for path in paths:
        try:
            for line in _lines(path):
                used = _parse(line)
                if used is None:
                    found.unreadable += 1
                elif used.model and used.time >= since:
                    found.requests.append(used)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
    found.requests.sort(key=lambda used: used.time)
    return found


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(stream, encoding="utf-8", errors="replace") as text:
            yield from text


def _parse(line: str) -> Used | None:
    """``None``: it is no line of the log; with an empty ``model``: no work of a model."""
    try:
        row = json.loads(line)
        time, status, path = float(row["time"]), int(row["status"]), str(row["path"])
        model, user = str(row["model"]), str(row["key"])
        if row.get("caller", "-") != "-":
            user = str(row["caller"])
        asked, answered = int(row["bytes_in"]), int(row["bytes_out"])
        ms, first_ms = float(row["ms"]), float(row["first_byte_ms"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    if not all(map(math.isfinite, (time, ms, first_ms))):
        return None
    refused = 400 <= status < 500 and status != 499
    if model == "-" or row.get("method") != "POST" or refused:
        return Used(time, "", 0, 0, user)
    prompt = 1 if path.endswith(_WITHOUT_PROMPT) else max(1, (asked - _ASKED_BYTES) // _BYTES_PER_TOKEN)
    model, user = sys.intern(model), sys.intern(user)  # one text each for a log of millions of lines
    return Used(time, model, prompt, 0 if path.endswith(_WITHOUT_OUTPUT) else _output(answered, ms, first_ms), user)


def _output(answered: int, ms: float, first_ms: float) -> int:
    streams = first_ms >= 0 and ms - first_ms > max(_STREAM_MS, ms / 10)
    return answered // _CHUNK_BYTES if streams else max(0, answered - _ANSWERED_BYTES) // _BYTES_PER_TOKEN


def classified(
    requests: Sequence[Used], catalog: Sequence[Model], chosen: Mapping[str, str]
) -> tuple[list[Used], dict[str, str]]:
    """The requests with the simulator's names for their models, ``CLASS-NAME``; and name -> class.

    (1) ``chosen``; (2) the name says it; (3) the smallest class that is as large as the catalog's entry, else the
    largest; (4) not in the catalog: the smallest. An alias is its model.
    """
    entries = {name: model for model in catalog for name in model.names}
    classes: dict[str, str] = {}
    named = []
    for one in requests:
        entry = entries.get(one.model)
        name = one.model if entry is None else entry.name
        if name not in classes:
            classes[name] = chosen.get(name) or chosen.get(one.model) or _class_of(name, entry)
        kept = name.split("-", 1)[0] == classes[name] and "-" in name
        named.append(replace(one, model=name if kept else f"{classes[name]}-{name}"))
    return named, classes


def _class_of(name: str, entry: Model | None) -> str:
    said = name.split("-", 1)[0]
    if said in CLASSES:
        return said
    if entry is None:
        return next(iter(CLASSES))
    needed_gib = max(1, entry.gpus) * entry.memory_mib / 1024
    fits = (kind for kind, (gpus, gib) in CLASSES.items() if gpus >= entry.gpus and gpus * gib >= needed_gib)
    return next(fits, list(CLASSES)[-1])


def pseudonym(secret: bytes) -> Callable[[str], str]:
    """A name for each user that stays the same for one ``secret``, and does not lead back without it."""

    def hidden(user: str) -> str:
        return "u-" + hashlib.blake2b(user.encode(), digest_size=6, key=secret).hexdigest()

    return hidden


def write_trace(requests: Iterable[Used], named: Callable[[str], str], out: IO[str]) -> int:
    """Write the trace; returns the number of requests. ``named``: the name of a user in it."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    began: float | None = None
    count = 0
    for count, one in enumerate(requests, start=1):  # noqa: B007 - the count is the result
        began = one.time if began is None else began
        at = f"{one.time - began:.3f}"
        writer.writerow((at, one.model, one.prompt_tokens, one.output_tokens, named(one.user)))
    return count
