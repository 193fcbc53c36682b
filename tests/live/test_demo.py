"""``make demo`` as a newcomer sees it: real models, real answers, and nothing left behind, whenever it is stopped."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway_plugin.paths import Layout

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(700),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


class Demo:
    """A demo of its own state folder, in a session of its own, as on a terminal."""

    def __init__(self, state: Path) -> None:
        self.layout = Layout(state)
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "run_demo.py")],
            env={**os.environ, "DEMO_STATE": str(state)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def read_until(self, pattern: str) -> None:
        """Read its output up to a line that ``pattern`` is found in."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return
        raise AssertionError(f"it never said {pattern!r}:\n" + "\n".join(self.said))

    def finish(self) -> int:
        """Read the rest. Returns the exit code."""
        assert self.process.stdout is not None
        self.said += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait(timeout=60)

    def interrupt(self) -> None:
        """Ctrl-C: to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def processes(self) -> list[str]:
        """Every process whose command line, environment or output speaks of this demo's folders.

        vLLM's core writes its title over the first two; its output still goes to a log of ours.
        """
        marks = (str(self.layout.state), str(self.layout.run))
        found = []
        for process in psutil.process_iter():
            try:
                outputs = (f"/proc/{process.pid}/fd/{number}" for number in (1, 2))
                words = [*process.cmdline(), *process.environ().values(), *map(os.readlink, outputs)]
                if process.status() != psutil.STATUS_ZOMBIE and any(mark in word for word in words for mark in marks):
                    found.append(" ".join(process.cmdline())[:150])
            except (psutil.Error, OSError):
                continue  # it ended just now, or has no output
        return found


@pytest.fixture
def demo() -> Iterator[Demo]:
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        made = Demo(Path(folder) / "state")
        assert made.process.stdout is not None
        try:
            with made.process.stdout:
                yield made
                if made.process.poll() is None:
                    made.interrupt()
                    made.finish()
        finally:  # before its folder is removed, by which its parts are found
            if made.processes():
                gateway = [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(made.layout.state)]
                subprocess.run([*gateway, "down", "--force"], check=False, capture_output=True)


def nothing_left(demo: Demo) -> bool:
    deadline = time.monotonic() + 30
    while demo.processes() and time.monotonic() < deadline:
        time.sleep(0.1)  # the last ones are being reaped
    assert demo.processes() == []
    return True


def test_the_demo_answers_from_its_sources_and_leaves_nothing(demo: Demo) -> None:
    began = time.monotonic()
    assert demo.finish() == 0, "\n".join(demo.said)
    text = "\n".join(demo.said)
    found = re.fullmatch(r"demo ok: 2 models, (\d+) switches, (\d+) requests, 0 failed", demo.said[-1])
    assert found is not None, text
    assert int(found[1]) >= 2
    assert int(found[2]) >= 6
    for source, word in (("bats.txt", "echolocation"), ("mercury.txt", "Mercury"), ("volcanoes.txt", "Krakatoa")):
        assert source in text
        assert re.search(rf"answer .*{word}", text), text
    for words in ("loading", "ready after", "evicted"):
        assert words in text
    assert nothing_left(demo)
    print(f"the demo took {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("moment", ["Ray head: starting", r"(smollm2|minilm)\S*: loading"], ids=["up", "loading"])
def test_ctrl_c_leaves_no_process_and_says_where_the_logs_are(demo: Demo, moment: str) -> None:
    demo.read_until(moment)
    assert demo.processes(), "it should be seen while it runs"
    demo.interrupt()
    assert demo.finish() == 130, "\n".join(demo.said)
    assert str(demo.layout.logs) in demo.said[-1]
    assert nothing_left(demo)
