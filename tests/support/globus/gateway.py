"""A stand-in for the gateway in tests of the endpoint: one fake engine with a key."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class EngineAsGateway:
    """A fake engine over plain HTTP, and the requests that it received."""

    url: str
    key: str
    record: Path
    child: subprocess.Popen[str]

    def seen(self) -> list[dict[str, Any]]:
        """Path, headers and body size of every request."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


@contextmanager
def engine_as_gateway(*options: str, port: int = 0, key: str | None = None) -> Iterator[EngineAsGateway]:
    """One that serves the model ``tiny``."""
    key = key or secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory(prefix="gwe-") as folder:
        record = Path(folder) / "seen.jsonl"
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fake_engine", "--model", "tiny", "--port", str(port),
             "--record", str(record), *options],
            cwd=ROOT, env={**os.environ, "VLLM_API_KEY": key}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            assert line.startswith("listening "), line
            yield EngineAsGateway(f"http://{line.split()[1]}", key, record, child)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
