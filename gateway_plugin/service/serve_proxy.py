"""Serve's HTTP proxy answers only callers with a certificate of the gateway's authority.

Serve passes an authority to uvicorn (``ssl_ca_certs``), but not the demand for a client certificate. Serve does offer a
user-defined hook, called in the proxy's process before the server is created (``CALLBACK``).
"""

from __future__ import annotations

import socket
import ssl
from typing import Any

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""The environment variable of the hook, for the Ray head's processes."""


def demand_certificates() -> list[Any]:
    """Called by Serve: no server without the demand. Without an authority every caller is rejected. No middlewares."""
    import uvicorn

    class Demanding(uvicorn.Config):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "ssl_cert_reqs": ssl.CERT_REQUIRED})

    uvicorn.Config = Demanding  # type: ignore[misc]
    return []


def answers_strangers(port: int, timeout_s: float = 5.0) -> bool:
    """Whether the proxy on this machine's ``port`` answers a caller without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), timeout_s) as plain, context.wrap_socket(plain) as link:
            link.sendall(b"GET /-/healthz HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n")
            return bool(link.recv(1))
    except OSError:
        return False
