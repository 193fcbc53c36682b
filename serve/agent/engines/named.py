"""Runs a Python module whose server is uvicorn on a Unix socket, and gives every request the model's own name.

For programs that know neither: ``transformers serve`` listens on TCP alone, and refuses a request whose ``model`` is
not the very text that it was started with. The engine's Python runs this file's text (``-c``), because it need not have
this package, nor see it from inside a container:

    python -c TEXT SOCKET NAME WEIGHTS MODULE ARGUMENTS...

It works in the socket's folder, where NAME becomes a link to the folder WEIGHTS: answers then name the model NAME, and
no path. WEIGHTS ``-``: NAME is a hub's.
"""

import json
import os
import re
import runpy
import sys
from typing import Any

_FIELD = re.compile(rb'(name="model"\r\n(?:[^\r\n]+\r\n)*\r\n)[^\r\n]*')
"""The field ``model`` of a form."""


def renamed(body: bytes, form: bool, name: str) -> bytes:
    """``body`` with ``name`` as its model; unchanged if it has none, or is not what it claims to be."""
    if form:
        return _FIELD.sub(lambda found: found[1] + name.encode(), body, count=1)
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(asked, dict) or "model" not in asked:
        return body
    return json.dumps({**asked, "model": name}).encode()


class Named:
    """An ASGI application before which requests are renamed."""

    def __init__(self, app: Any, name: str) -> None:
        self._app, self._name = app, name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the caller left
            body += message.get("body", b"")
            more = message.get("more_body", False)
        form = dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/form-data")
        body = renamed(body, form, self._name)
        others = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        rest = iter(({"type": "http.request", "body": body, "more_body": False},))

        async def again() -> Any:
            return next(rest, None) or await receive()

        length = (b"content-length", str(len(body)).encode())
        await self._app({**scope, "headers": [*others, length]}, again, send)


def main(socket: str, name: str, weights: str, module: str, *arguments: str) -> None:
    """The program."""
    import uvicorn

    begin = uvicorn.Config.__init__

    def begin_here(self: Any, app: Any, *args: Any, **given: Any) -> None:
        begin(self, Named(app, name), *args, **{**given, "uds": socket})

    uvicorn.Config.__init__ = begin_here  # type: ignore[method-assign]
    if weights != "-":
        os.chdir(os.path.dirname(socket))
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        os.symlink(weights, name)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
