"""Globus Compute for ``gateway endpoint``: through the registrar, a program of the endpoint's environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

from gateway_plugin.errors import ServiceError
from gateway_plugin.globus.endpoint.config_files import process_environment

_PROGRAM = Path(__file__).with_name("registrar.py")

Pause = Callable[[], AbstractContextManager[None]]
"""While it is entered nothing else is drawn on the terminal: a user logs in there."""


class Registrar:
    """One program for several requests: its start takes seconds. A context manager."""

    def __init__(self, venv: Path, globus_folder: Path, pause: Pause = nullcontext) -> None:
        self._argv = [str(venv / "bin" / "python"), str(_PROGRAM)]
        self._environment = process_environment(os.environ, venv, globus_folder)
        self._pause = pause
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._child = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                text=True,
            )
        except OSError as error:
            raise ServiceError(
                f"{self._argv[0]} cannot be started ({error.strerror}); run 'gateway endpoint configure' again."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        child = self._child
        assert child is not None
        if kind is not None:
            child.kill()
        child.communicate()

    def ask(self, action: str, **arguments: Any) -> Any:
        """Send one request; a user logs in on the terminal first, if need be.

        Raises ``ServiceError`` with Globus Compute's message, or that there is no terminal.
        """
        try:
            answer = self._exchange({"action": action, **arguments})
            if "login" in answer:
                with self._pause():
                    answer = self._exchange({})
        except (OSError, ValueError) as error:
            raise ServiceError(f"{' '.join(self._argv)} ended without an answer; run it by hand to see why.") from error
        if "error" in answer:
            said = answer["error"]
            if said["kind"] == "NoTerminal":
                raise ServiceError(said["message"])
            raise ServiceError(
                f"Globus Compute: {action.replace('_', ' ')} failed ({said['kind']}: {said['message']})."
            )
        return answer["ok"]

    def _exchange(self, document: dict[str, Any]) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(document) + "\n")
        child.stdin.flush()
        return dict(json.loads(child.stdout.readline()))
