"""Talks to Globus Compute for ``gateway endpoint``: a program of the endpoint's own environment, where its SDK is.

A JSON request a line on stdin, a JSON answer a line on stdout: ``{"ok": ...}`` or ``{"error": {"kind", "message"}}``.
Before a login it writes ``{"login": true}`` and waits for a line, so that the terminal is free by then.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NO_TERMINAL = (
    "Nobody is logged in to Globus, and there is no terminal to ask on: run this on one, or set "
    "GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET."
)


class NoTerminal(Exception):
    """A login is needed, and there is no terminal."""


class Gateway:
    """The calling command, on the other side of the pipes that were stdin and stdout."""

    def __init__(self) -> None:
        # Taken away from under stdin and stdout: the SDK prints there, and its login reads there.
        self._asked: IO[str] = os.fdopen(os.dup(0), "r", encoding="utf-8")
        self._answers: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

    def read(self) -> dict[str, Any] | None:
        """Its next request; ``None`` at the end."""
        line = self._asked.readline()
        return dict(json.loads(line)) if line else None

    def write(self, document: dict[str, Any]) -> None:
        """Answer it."""
        self._answers.write(json.dumps(document) + "\n")
        self._answers.flush()


def main() -> None:
    """Answer one request after the other until stdin ends."""
    logging.disable(logging.WARNING)
    gateway = Gateway()
    client = _Client(gateway)
    while (asked := gateway.read()) is not None:
        try:
            answer = {"ok": _ACTIONS[asked.pop("action")](client, **asked)}
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the SDK raises much, and exits; the user sees it
            answer = {"error": {"kind": type(error).__name__, "message": _words(error)}}
        gateway.write(answer)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


class _Client:
    """The SDK's client, made and logged in when it is first needed."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._made: Any = None

    def __call__(self) -> Any:
        if self._made is None:
            from globus_compute_endpoint.auth import get_globus_app_with_scopes
            from globus_compute_sdk import Client

            app = get_globus_app_with_scopes()
            if app.login_required():
                self._login(app)
            self._made = Client(app=app, do_version_check=False)
        return self._made

    def _login(self, app: Any) -> None:
        if os.environ.get("GLOBUS_COMPUTE_CLIENT_SECRET"):
            app.login()  # without a prompt
            return
        with _on_terminal():
            self._gateway.write({"login": True})
            self._gateway.read()
            app.login()


@contextmanager
def _on_terminal() -> Iterator[None]:
    """Output appears on the terminal and input is read from it, in spite of redirections."""
    try:
        reader = open("/dev/tty", encoding="utf-8")  # noqa: SIM115  # entered below: only its opening may fail here
    except OSError:
        raise NoTerminal(_NO_TERMINAL) from None
    with reader:
        if os.tcgetpgrp(reader.fileno()) != os.getpgrp():  # in the background: to read would stop the whole command
            raise NoTerminal(_NO_TERMINAL)
        with open("/dev/tty", "w", encoding="utf-8", buffering=1) as writer:
            before = sys.stdin, sys.stdout
            sys.stdin, sys.stdout = reader, writer
            try:
                yield
            finally:
                sys.stdin, sys.stdout = before


def login(client: _Client) -> None:
    """Log a user in on the terminal."""
    client()


def identity(client: _Client) -> str:
    """The Globus identity that is logged in."""
    from globus_compute_sdk.sdk.auth.auth_client import ComputeAuthClient

    return str(ComputeAuthClient(app=client().app).userinfo()["sub"])


def register_function(client: _Client, source: str, entry_point: str, description: str) -> str:
    """Register the function's text; returns its id."""
    # Public: any user may call it where an endpoint allows it. It holds no secret, and it does nothing elsewhere.
    made = client().register_source_code(source, entry_point, description=description, public=True)
    return str(made)


def register_endpoint(client: _Client, folder: str) -> str:
    """Register the endpoint in ``folder``, as ``globus-compute-endpoint start`` does; returns its id."""
    from globus_compute_endpoint.cli import _do_register_endpoint
    from globus_compute_endpoint.endpoint.config.utils import get_config

    place = Path(folder)
    endpoint = str(_do_register_endpoint(place, get_config(place), None)["endpoint_id"])
    (place / "endpoint.json").write_text(json.dumps({"endpoint_id": endpoint}))
    return endpoint


def status(client: _Client, endpoint: str) -> dict[str, Any]:
    """The service's status of an endpoint."""
    return dict(client().get_endpoint_status(endpoint))


def delete(client: _Client, endpoint: str) -> None:
    """Remove an endpoint from the service; one that it does not know is removed already."""
    from globus_sdk import GlobusAPIError

    try:
        client().delete_endpoint(endpoint)
    except GlobusAPIError as error:
        if error.http_status != 404:
            raise


_ACTIONS: dict[str, Callable[..., Any]] = {
    "login": login,
    "identity": identity,
    "register_function": register_function,
    "register_endpoint": register_endpoint,
    "status": status,
    "delete": delete,
}

if __name__ == "__main__":
    os.umask(0o077)
    with suppress(KeyboardInterrupt):  # Ctrl-C is the command's: it reports it
        main()
