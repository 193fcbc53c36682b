"""What the ingress reads of a request: its body, bounded, and the few keys of it that matter."""

from __future__ import annotations

import json
from dataclasses import dataclass

from starlette.requests import Request

from gateway_plugin.catalog import MODEL_NAME
from gateway_plugin.errors import BodyTooLarge, InvalidRequest


@dataclass(frozen=True)
class Ask:
    """One inference request: the body as it came, the model it names, and whether it wants a stream."""

    body: bytes
    model: str
    stream: bool


async def read_bounded(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises ``BodyTooLarge`` as soon as it is over the limit."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def parse_ask(body: bytes, named: str | None) -> Ask:
    """What ``body`` asks for. ``named``: the model the edge found, or the caller's ``x-gateway-model``.

    Raises:
        InvalidRequest: (1) no JSON object, (2) no model in it and none named, (3) a name that no model can have.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("The request body is not valid JSON.") from None  # (1)
    if not isinstance(document, dict):
        raise InvalidRequest("The request body must be a JSON object.")  # (1)
    model = named or document.get("model")
    if model is None:
        raise InvalidRequest("The request body has no 'model'; 'gateway models list' shows what there is.")  # (2)
    if not isinstance(model, str) or not MODEL_NAME.fullmatch(model):
        raise InvalidRequest("'model' is not a name that a model can have.")  # (3)
    return Ask(body, model, stream=document.get("stream") is True)
