"""Talks to Globus Compute for ``gateway endpoint``: a program of the endpoint's own environment, where its SDK is.

A JSON request a line on stdin, a JSON answer a line on stdout: ``{"ok": ...}`` or ``{"error": {"kind", "message"}}``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Do one thing after the other until stdin ends."""
    logging.disable(logging.WARNING)
    answers_to, sys.stdout = sys.stdout, sys.stderr  # what the SDK prints (a login's URL) is for people
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"ok": _ACTIONS[asked.pop("action")](**asked)}
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the SDK raises much, and exits; the user is told
            answer = {"error": {"kind": type(error).__name__, "message": _words(error)}}
        answers_to.write(json.dumps(answer) + "\n")
        answers_to.flush()


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


@functools.cache
def _client() -> Any:
    from globus_compute_endpoint.auth import get_globus_app_with_scopes
    from globus_compute_sdk import Client

    app = get_globus_app_with_scopes()
    if app.login_required():
        app.login()
    return Client(app=app, do_version_check=False)


def identity() -> str:
    """The Globus identity that acts here."""
    from globus_compute_sdk.sdk.auth.auth_client import ComputeAuthClient

    return str(ComputeAuthClient(app=_client().app).userinfo()["sub"])


def register_function(source: str, entry_point: str, description: str) -> str:
    """Register the function's text; its id."""
    # Public: everybody may call it where an endpoint allows it. It holds no secret, and it does nothing elsewhere.
    made = _client().register_source_code(source, entry_point, description=description, public=True)
    return str(made)


def register_endpoint(folder: str) -> str:
    """Register what lies in ``folder``, as ``globus-compute-endpoint start`` does; the id."""
    from globus_compute_endpoint.cli import _do_register_endpoint
    from globus_compute_endpoint.endpoint.config.utils import get_config

    place = Path(folder)
    endpoint = str(_do_register_endpoint(place, get_config(place), None)["endpoint_id"])
    (place / "endpoint.json").write_text(json.dumps({"endpoint_id": endpoint}))
    return endpoint


def status(endpoint: str) -> dict[str, Any]:
    """What the service says of an endpoint."""
    return dict(_client().get_endpoint_status(endpoint))


def delete(endpoint: str) -> None:
    """Remove an endpoint from the service; one that it does not know is removed already."""
    from globus_sdk import GlobusAPIError

    try:
        _client().delete_endpoint(endpoint)
    except GlobusAPIError as error:
        if error.http_status != 404:
            raise


_ACTIONS: dict[str, Callable[..., Any]] = {
    "identity": identity,
    "register_function": register_function,
    "register_endpoint": register_endpoint,
    "status": status,
    "delete": delete,
}

if __name__ == "__main__":
    os.umask(0o077)
    main()
