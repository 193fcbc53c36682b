"""Back through the edge: a request whose model is ready goes out of the inner door, so that the edge counts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx

from serve.ingress.body import Ask

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
     "upgrade", "host", "content-length", "expect"}
)  # fmt: skip
"""RFC 9110, 7.6.1, and what the HTTP client writes itself."""

NOT_ROUTED = "x-gateway-not-routed"
"""On an ingress's answer to a request that came in through the inner door and found no engine, and on the edge's own
where an engine broke off before its answer (``gateway_plugin.edge.answers``)."""

STAMP = "x-gateway-stamp"
"""Put on by the inner door."""


class Relay:
    """The inner door's client."""

    def __init__(self, inner_door: Path) -> None:
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(inner_door), limits=httpx.Limits(max_connections=None)),
            timeout=httpx.Timeout(None, connect=5.0),
        )

    async def send(self, method: str, path: str, headers: Mapping[str, str], ask: Ask) -> httpx.Response:
        """The engine's response, its body not read yet; the caller closes it.

        Raises ``httpx.TransportError`` if the edge is away or breaks off.
        """
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in _HOP_BY_HOP and not name.lower().startswith("x-gateway-")
        }
        if "x-gateway-request" in headers:
            kept["x-gateway-request"] = headers["x-gateway-request"]
        kept["x-gateway-model"] = ask.model
        # Not the client's build_request: it would add headers that the caller did not send.
        request = httpx.Request(method, f"http://inner{path}", headers=kept, content=ask.body)
        return await self._client.send(request, stream=True)


def response_headers(response: httpx.Response) -> dict[str, str]:
    """What of the engine's headers goes back to the caller. With its length: HTTP/1.0 knows no chunks."""
    dropped = _HOP_BY_HOP - {"content-length"}
    return {name: value for name, value in response.headers.items() if name.lower() not in dropped}


def is_not_routed(response: httpx.Response) -> bool:
    """The edge had no usable engine for it: the request came back to an ingress."""
    return NOT_ROUTED in response.headers
