"""An HTTP server in place of a gateway's owner socket, for clients of its own user."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout

URL = "https://127.0.0.1:8180"
"""Of the gateway that ``service.json`` names; nothing listens there in these tests."""


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def owner_door(
    state: Path, handler: type[BaseHTTPRequestHandler], key: str | None = "gw-x", **record: Any
) -> Iterator[Layout]:
    """A state folder that names a gateway of this machine, whose socket ``handler`` serves."""
    layout = Layout(private_folder(state))
    layout.service_json.write_text(json.dumps({"url": URL, **record}))
    if key is not None:
        layout.admin_key.write_text(key + "\n")
    private_folder(layout.run)
    server = _Server(str(layout.owner_door), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield layout
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        shutil.rmtree(layout.run)
