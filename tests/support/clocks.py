"""The machine's wall clock, set while a test runs, as the code under test sees it."""

from __future__ import annotations

import time

import pytest

from gateway_plugin import processes as identity

_wall_clock = time.time
_boot_time = identity._boot_time_s


def set_clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Set the wall clock by ``step_s`` against the real one; the kernel's boot time moves with it."""
    monkeypatch.setattr(time, "time", lambda: _wall_clock() + step_s)
    monkeypatch.setattr(identity, "_boot_time_s", lambda: _boot_time() + step_s)


SLACK = 3.0
"""Deadlines of the tests are written for a machine of their own, and multiplied by this: two pytest workers share one,
and a wait that ends sooner costs nothing."""
