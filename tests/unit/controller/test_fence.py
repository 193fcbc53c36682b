"""A controller that was replaced is gone before the next one begins."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.controller.fence import become_the_only_one

pytestmark = pytest.mark.process

HOLD = """
import sys, time
from pathlib import Path
from serve.controller.fence import become_the_only_one
become_the_only_one(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(lock: Path, for_s: float) -> subprocess.Popen[str]:
    made = subprocess.Popen([sys.executable, "-c", HOLD, str(lock), str(for_s)], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    assert made.stdout.readline() == "held\n"
    return made


def test_the_one_before_is_waited_for_and_then_killed(tmp_path: Path) -> None:
    before = holder(tmp_path / "lock", 60)
    began = time.monotonic()
    try:
        become_the_only_one(tmp_path / "lock", patience_s=0.3)
        assert time.monotonic() - began >= 0.3
        assert before.wait(5) == -9
    finally:
        before.kill()
        before.wait()


def test_one_that_ends_by_itself_is_left_in_peace(tmp_path: Path) -> None:
    before = holder(tmp_path / "lock", 0.3)
    become_the_only_one(tmp_path / "lock", patience_s=30)
    assert before.wait(5) == 0
