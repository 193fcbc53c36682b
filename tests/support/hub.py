"""A hub on loopback, for the hub's own client: metadata, files, redirects to a second server, ranges, and bad luck."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SHA = "0" * 39 + "1"
LFS_ABOVE = 1 << 20
"""Larger files are kept apart, as git-lfs does: a redirect leads to them."""
CONFIG = b'{"model_type": "x"}'


@lru_cache(64)
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(64)
def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """What the hub has under one name."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = SHA
    gated: bool = False
    """Its files are given to ``token`` alone."""
    licence: str = "apache-2.0"
    said_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes in the listing of files whose content is not there."""


@dataclass
class Hub:
    """The stand-in: what it has, how it behaves, and what it saw."""

    repositories: dict[str, Repository]
    url: str = ""
    token: str = "hf_right"
    breaks: list[int] = field(default_factory=list)
    """Of the next answers with large content: bytes after which the connection breaks."""
    damages: int = 0
    """So many answers with large content have a wrong byte."""
    content_status: list[int] = field(default_factory=list)
    """Of the next requests for large content: answered so, with ``refusal``."""
    refusal: bytes = b"<Error>expired</Error>"
    ranges: bool = True
    chunk_s: float = 0.0
    """A pause before each 64 KiB of large content."""
    status: int = 0
    """Every request gets this instead."""
    listing: bytes | None = None
    """Every question about a repository is answered so."""
    listing_status: int = 200
    seen: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Requests: server (``hub`` or ``content``), method and path, range, authorization."""
    sent: dict[str, int] = field(default_factory=dict)
    """Large content: its hash -> bytes sent."""
    sending: int = 0
    most_sending: int = 0

    def requests(self, words: str) -> int:
        return sum(words in path for _, path, _, _ in self.seen)

    def environment(self, cache: Path) -> dict[str, str]:
        """For a program whose client is to ask this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent / "hf-home")}

    def here(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have this process's own client ask this hub."""
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "no-token"))
        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """The stand-in, running: the hub itself, and the server that large content lies on."""
    hub = Hub(repositories)
    content = _server(hub, _Content)
    front = _server(hub, _Front)
    hub.url = f"http://127.0.0.1:{front.server_port}"
    front.content_url = f"http://127.0.0.1:{content.server_port}"  # type: ignore[attr-defined]
    servers = (front, content)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


def _server(hub: Hub, handler: type[_Handler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.hub = hub  # type: ignore[attr-defined]
    return server


class _Handler(BaseHTTPRequestHandler):
    name = ""

    @property
    def hub(self) -> Hub:
        found: Hub = self.server.hub  # type: ignore[attr-defined]
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization", "")
        self.hub.seen.append((self.name, f"{self.command} {self.path}", self.headers.get("Range", ""), authorization))
        if self.hub.status:
            self.answer(self.hub.status, b"{}")
        else:
            self.act()

    def act(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        given = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        for key, value in given.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        return


class _Front(_Handler):
    name = "hub"

    def act(self) -> None:
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+(?:/(?!revision/)[^/]+)?)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or resolve
        if found is None:
            self.answer(404, b"{}")
            return
        name, revision = found[1], found[2] or "main"
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", repository.commit):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api and self.hub.listing is not None:
            with suppress(ConnectionError):  # the client may read no more
                self.answer(self.hub.listing_status, self.hub.listing)
        elif api:
            self.answer(200, json.dumps(_info(name, repository)).encode())
        elif repository.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(403 if self.headers.get("Authorization") else 401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif found[3] not in repository.files:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
        else:
            self._file(repository.files[found[3]], repository.commit)

    def _file(self, content: bytes, commit: str) -> None:
        if len(content) <= LFS_ABOVE:
            self.answer(200, content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": commit})
            return
        digest = sha256(content)
        to = self.server.content_url + f"/{digest}?signature=secret"  # type: ignore[attr-defined]
        headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Location": to}
        self.answer(302, b"", {**headers, "X-Repo-Commit": commit})


class _Content(_Handler):
    name = "content"

    def act(self) -> None:
        if self.hub.content_status:
            with suppress(ConnectionError):
                self.answer(self.hub.content_status.pop(0), self.hub.refusal)
            return
        digest = self.path.strip("/").partition("?")[0]
        every = (content for one in self.hub.repositories.values() for content in one.files.values())
        content = next((content for content in every if len(content) > LFS_ABOVE and sha256(content) == digest), None)
        if content is None:
            self.answer(404, b"{}")
            return
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.hub.ranges:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
        self.send_response(206 if asked and self.hub.ranges else 200)
        if asked and self.hub.ranges:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{digest}"')
        self.end_headers()
        if self.command != "HEAD":
            self._send(digest, content[first : last + 1])

    def _send(self, digest: str, piece: bytes) -> None:
        hub = self.hub
        end = hub.breaks.pop(0) if hub.breaks else len(piece)
        if hub.damages:
            hub.damages -= 1
            piece = piece[:10] + bytes([piece[10] ^ 1]) + piece[11:]
        hub.sending += 1
        hub.most_sending = max(hub.most_sending, hub.sending)
        try:
            for at in range(0, min(end, len(piece)), 1 << 16):
                if hub.chunk_s:
                    time.sleep(hub.chunk_s)
                part = piece[at : min(end, at + (1 << 16))]
                self.wfile.write(part)
                hub.sent[digest] = hub.sent.get(digest, 0) + len(part)
        except OSError:
            pass  # the client went away
        finally:
            hub.sending -= 1
        if end < len(piece):
            self.close_connection = True
            self.connection.close()


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for file, content in repository.files.items():
        one: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": git_hash(content)}
        if len(content) > LFS_ABOVE:
            one["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        siblings.append(one)
    siblings += [{"rfilename": file, "size": size} for file, size in repository.said_sizes.items()]
    return {
        "id": name, "sha": repository.commit, "gated": "manual" if repository.gated else False, "siblings": siblings,
        "cardData": {"license": repository.licence}, "tags": [], "downloads": 0, "likes": 0, "private": False,
        "disabled": False,
    }  # fmt: skip
