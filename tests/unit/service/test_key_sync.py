"""The supervisor's thread that keeps the keys in force: it goes on whatever happens, and says each change once."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.errors import EdgeError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.service import key_sync


def test_it_goes_on_after_failures_and_says_each_change_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    outcomes: list[Exception | None] = [
        EdgeError("late"), EdgeError("late"), OSError("disk"), None, None, ServiceError("damaged"),
    ]  # fmt: skip

    def look(self: object) -> None:
        outcome = outcomes.pop(0)
        if not outcomes:
            stop.set()
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(KeyStore, "keep_in_force", look)
    monkeypatch.setattr(key_sync, "_EVERY_S", 0.0)
    with caplog.at_level(logging.WARNING, "gateway.supervisor"):
        key_sync.keep_keys_in_force(Layout(tmp_path), stop)
    assert outcomes == []
    assert [record.getMessage() for record in caplog.records] == [
        "keys late", "keys disk", "keys in force again", "keys damaged",
    ]  # fmt: skip
