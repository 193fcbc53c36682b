"""A drain on a bad day: the run folder's disk is full, or the command line's key is garbled."""

from __future__ import annotations

import logging
import math
import os
import threading
from pathlib import Path

import pytest

from gateway_plugin.paths import Layout
from gateway_plugin.processes import mark
from gateway_plugin.service import draining
from gateway_plugin.service.draining import Drain, DrainRequest, drain_as_asked, let_finish
from tests.support.disks import full_disk


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    made = Layout(tmp_path / "state")
    made.make()
    return made


def test_who_cannot_tell_the_supervisor_the_grace_gives_it_and_then_has_it_end_the_rest(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that is signalled without a request gives ``SIGNALLED_GRACE_S``."""
    done: list[object] = []
    own = mark(os.getpid())
    assert own is not None

    def drain(_layout: Layout, grace_s: float, *_: object) -> Drain:
        done.append(grace_s)
        return Drain(done=True)

    monkeypatch.setattr(draining, "drain", drain)
    monkeypatch.setattr(draining, "_signal", done.append)
    monkeypatch.setattr(draining, "_SLOW_S", 0.0)
    with full_disk():
        assert let_finish(layout, (own,), 0.5, threading.Event(), lambda _: None).done
        assert done == [0.5, (own,)]
        let_finish(layout, (own,), 0.0, threading.Event(), lambda _: None)
        assert done == [0.5, (own,), (own,)]


@pytest.mark.parametrize("garbled", [b"\xff", "gw-\u00e9".encode()])
def test_a_garbled_key_stops_no_drain(layout: Layout, garbled: bytes, caplog: pytest.LogCaptureFixture) -> None:
    layout.admin_key.write_bytes(garbled)
    with caplog.at_level(logging.WARNING, "gateway.drain"):
        draining._tell_waiters(layout)
    assert "requests that wait for models are not answered" in caplog.text


@pytest.mark.parametrize("grace_s", [0.0, 7.5, math.inf])
def test_the_supervisor_drains_with_the_grace_that_was_asked_for(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    given: list[float] = []

    def drained(_layout: Layout, grace_s: float, *_: object) -> Drain:
        given.append(grace_s)
        return Drain()

    monkeypatch.setattr(draining, "drain", drained)
    draining._write(draining._request(layout), DrainRequest(grace_s=grace_s))
    drain_as_asked(layout, threading.Event())
    assert given == [grace_s]
