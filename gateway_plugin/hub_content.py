"""The content of one large file on the hub, read in ranges into a part that a later attempt continues."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gateway_plugin import hub
from gateway_plugin.errors import ServiceError
from gateway_plugin.files import NO_ROOM

PARTIAL = ".gateway.incomplete"
"""The end of a part's name; the hub's own tools list ``*.incomplete`` as what may be removed."""
_RANGE = 4 << 30
"""Bytes a request: the hub's servers refuse single answers above 50 GB."""
_CHUNK = 1 << 20
_TRIES = 6
"""Attempts in a row that bring nothing, before it fails: half a minute in sum."""


@dataclass(frozen=True)
class LargeFile:
    """One file of a repository at a commit, as the hub describes it."""

    repository: str
    commit: str
    path: str
    size: int
    sha256: str


def read_content(file: LargeFile, blob: Path, token: str | None, arrived: Callable[[int], None]) -> None:
    """Have the content of ``file`` in ``blob``. Each attempt continues the part beside it; its SHA-256 is compared.

    Args:
        arrived: called with the bytes that are there, for each MiB; may raise to end this.

    Raises:
        ServiceError, NotFound: as ``hub.asking``; the disk is full; or the content is not what the hub says.
    """
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(blob.name + PARTIAL)
    for _ in range(2):
        if _read(file, part, token, arrived) == file.sha256:
            part.rename(blob)
            return
        part.unlink()
        arrived(0)
    raise ServiceError(
        f"{file.repository}: {file.path} came twice with another SHA-256 than the hub says. Try again; if it stays, "
        "something between this machine and the hub changes it."
    )


def _read(file: LargeFile, part: Path, token: str | None, arrived: Callable[[int], None]) -> str:
    """Read until ``part`` is whole; its SHA-256."""
    with hub.asking(file.repository, file.commit):
        import httpx2  # the client's own; an error of its answers is an OSError, too

        broken = (httpx2.TransportError, OSError)
    with open(part, "a+b") as stream:
        seen = hashlib.sha256()
        stream.seek(0)
        while piece := stream.read(_CHUNK):
            seen.update(piece)
            arrived(stream.tell())
        vain = 0
        while (at := stream.tell()) < file.size:
            try:
                _read_range(file, stream, at, seen, token, arrived)
            except broken as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise ServiceError(
                        f"{part} cannot be written: {error.strerror}. Make room there, then run it again: it goes on "
                        "where it stopped."
                    ) from None
                vain = 0 if stream.tell() > at else vain + 1
                if vain >= _TRIES or not _passes(error):
                    with hub.asking(file.repository, file.commit):
                        raise
                _pause(min(8.0, 0.5 * 2**vain), stream.tell(), arrived)
        stream.flush()
        os.fsync(stream.fileno())
        return seen.hexdigest() if at == file.size else ""


def _read_range(
    file: LargeFile, stream: IO[bytes], at: int, seen: hashlib._Hash, token: str | None, arrived: Callable[[int], None]
) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    until = min(file.size, at + _RANGE)
    headers = build_hf_headers(token=token)
    headers |= {"Range": f"bytes={at}-{until - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(file.repository, file.path, revision=file.commit)
    # A redirect to another host takes the token not along: the session is httpx's.
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.is_error:
            hub.whole(response, file.repository)  # the client would read a refusal of any size
        hf_raise_for_status(response)
        skip = at if response.status_code == 200 else 0  # a server or proxy without ranges
        for whole in response.iter_bytes(_CHUNK):
            piece = whole[skip:][: file.size - stream.tell()]
            skip = max(0, skip - len(whole))
            stream.write(piece)
            seen.update(piece)
            arrived(stream.tell())
    if stream.tell() == at:
        raise OSError("the hub's answer was empty")


def _passes(error: BaseException) -> bool:
    """Whether a further attempt makes sense: after a connection that broke, or a server that is busy or in trouble."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 425, 429) or status >= 500


def _pause(seconds: float, there: int, arrived: Callable[[int], None]) -> None:
    """Sleep, but end as soon as ``arrived`` raises."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        arrived(there)
        time.sleep(min(0.2, left))
