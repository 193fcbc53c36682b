"""An HTTP server in place of a gateway, for the command line: answers by path from documents that a test may change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.support.owner_doors import owner_door


@dataclass
class Answering:
    """``answers``: ``"GET /path"`` -> documents in order, the last one again and again."""

    state: Path
    answers: dict[str, list[Any]]
    told: list[tuple[str, Any]] = field(default_factory=list)
    """``POST`` paths and their bodies."""

    def answer(self, method: str, path: str, body: bytes) -> Any:
        if method == "POST":
            self.told.append((path, json.loads(body)))
        known = self.answers.get(f"{method} {path}", [{"ok": True}])
        return known.pop(0) if len(known) > 1 else known[0]


@contextmanager
def answering(state: Path, **answers: Any) -> Iterator[Answering]:
    """A state folder whose gateway answers; ``blocks``: what successive ``GET /gateway/v1/blocks`` list."""
    rows = [{"blocks": one} for one in answers.pop("blocks", [[]])]
    made = Answering(state, {"GET /gateway/v1/blocks": rows, "GET /gateway/v1/blocks?all=1": rows, **answers})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = made.answer(self.command, self.path, self.rfile.read(int(self.headers["content-length"] or 0)))
            text = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """No log: a test chooses its output."""

    with owner_door(state, Handler):
        yield made
