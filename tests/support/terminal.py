"""A program on a terminal of its own, which a test reads and types on."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any


class Terminal:
    """A pty with a program in its foreground. ``more``: for ``Popen``."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], **more: Any) -> None:
        self._side, other = pty.openpty()
        # a shell's foreground program receives Ctrl-C, even if these tests are a background job and do not
        begin = f"signal.signal(signal.SIGINT, signal.SIG_DFL); os.login_tty({other})"
        self.child = subprocess.Popen(
            [argv[0], "-c", f"import os, signal; {begin}; os.execv({argv[0]!r}, {list(argv)!r})"],
            pass_fds=(other,),
            env=dict(environment),
            **more,
        )
        os.close(other)
        self.shown = ""

    def read_until(self, words: str, within_s: float = 30.0) -> None:
        """Read the output until it contains ``words``."""
        deadline = time.monotonic() + within_s
        while words not in self.shown and not self.quiet_for(deadline - time.monotonic()) and self._read():
            pass
        assert words in self.shown, self.shown

    def quiet_for(self, seconds: float) -> bool:
        """Whether there is no output for ``seconds``."""
        return not select.select([self._side], [], [], max(0.0, seconds))[0]

    def type(self, words: str) -> None:
        """As a person: a line ends with a newline."""
        os.write(self._side, words.encode())

    def end(self, within_s: float = 30.0) -> int:
        """Wait until it ends; its exit code."""
        code = self.child.wait(within_s)
        while not self.quiet_for(0) and self._read():
            pass
        return code

    def close(self) -> None:
        """Kill it if it still runs."""
        self.child.kill()
        self.child.wait()
        os.close(self._side)

    def _read(self) -> bool:
        try:
            read = os.read(self._side, 65536).decode(errors="replace")
        except OSError:  # no process has it open any more
            return False
        self.shown += read
        return bool(read)
