"""Reads a request's body, bounded, and the few keys or fields of it that the ingress needs."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from gateway_plugin.catalog import MODEL_NAME
from gateway_plugin.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from serve.ingress.budget import Hold
from serve.ingress.form import NoForm, find_fields
from serve.ingress.scan import Malformed, scan

_YES = frozenset({b"true", b"1", b"on", b"yes", b"t", b"y"})
"""Values of a form's flag, in lower case, that are true to engines (pydantic)."""

DOCUMENT_BYTES = 1 << 20
"""For administrators' requests: a catalog of some thousand models."""
DEPTH_MAX = 32
_BEGINNINGS = (
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "in UTF-16"),
    ((b"\x1f\x8b", b"\x28\xb5\x2f\xfd"), "compressed; send it as it is"),
)
"""First bytes of other formats that clients send."""
_SLICE_BYTES = 1 << 20
"""Decoded in a millisecond or less."""


@dataclass(frozen=True)
class Ask:
    """One inference request: the body as it came, the model it names, and whether it wants a stream."""

    body: bytes
    model: str
    stream: bool


@dataclass(frozen=True)
class Pace:
    """Least rate of a body."""

    within_s: float = 30.0
    """For any body, and for the first part of a long one."""
    bytes_per_s: int = 16 << 10
    """Least rate from then on."""

    def seconds_for(self, size: int) -> float:
        """Deadline of a body of which ``size`` bytes have arrived: for its end, or more of it."""
        return self.within_s + size / self.bytes_per_s


PACE = Pace()


async def read_bounded(request: Request, limit_bytes: int, pace: Pace = PACE, held: Hold | None = None) -> bytes:
    """The whole body. ``held``: called with the size of each part as it arrives.

    Raises:
        BodyTooLarge: as soon as it is over the limit.
        RequestTimeout: it arrives too slowly.
        GatewayError: raised by ``held``.
    """
    chunks: list[bytes] = []
    size = 0
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(began + pace.within_s) as deadline:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit_bytes:
                    raise BodyTooLarge(limit_bytes)
                if held is not None:
                    held.more(len(chunk))
                chunks.append(chunk)
                deadline.reschedule(began + pace.seconds_for(size))
    except TimeoutError:
        raise RequestTimeout(
            f"The request's body came too slowly: {size} bytes so far. The gateway waits {pace.within_s:.0f} s, and "
            f"longer for a body that brings {pace.bytes_per_s} bytes a second."
        ) from None
    return b"".join(chunks)


def ask_in_slices(body: bytes, named: str | None, form: str | None = None) -> Generator[None, None, Ask]:
    """The request in ``body``; yields every few milliseconds.

    Args:
        named: the edge's model, or the caller's ``x-gateway-model``.
        form: the header ``Content-Type`` of a request on one of ``FORMS``; ``None``: the path takes JSON.

    Raises:
        InvalidRequest: (1) no JSON object, or no form, (2) no model in it and none named, (3) not a valid model name,
        (4) the model's name cannot be found in reasonable time, (5) not UTF-8.
    """
    return _of_json(body, named) if form is None else _of_form(body, named, form)


def _of_form(body: bytes, named: str | None, content_type: str) -> Generator[None, None, Ask]:
    try:
        fields = yield from find_fields(body, content_type, ("model", "stream"))
    except NoForm as error:
        raise InvalidRequest(
            f"The request body is no valid form: {error}. Such as: curl -F model=NAME -F file=@FILE"
        ) from None  # (1)
    stream = fields.get("stream", b"").lower() in _YES
    if named:
        return Ask(body, _model(named), stream)
    if "model" not in fields:
        raise InvalidRequest(
            "The form has no field 'model', nor the request a header x-gateway-model; 'gateway models list' shows what "
            "there is."
        )  # (2)
    return Ask(body, _model(fields["model"].decode("latin-1")), stream)


def _of_json(body: bytes, named: str | None) -> Generator[None, None, Ask]:
    for beginning, what in _BEGINNINGS:
        if body.startswith(beginning):
            raise InvalidRequest(f"The request body is not valid JSON in UTF-8: it is {what}.")  # (1)
    try:
        found = yield from scan(body, ("stream",) if named else ("model", "stream"))
    except Malformed:
        raise InvalidRequest("The request body is not valid JSON in UTF-8, or no JSON object.") from None  # (1)
    yield from _check_text(body)  # (5)
    stream = found.values.get("stream") == b"true"
    if named:
        return Ask(body, _model(named), stream)
    written = found.values.get("model")
    if written is None and not found.whole:
        raise InvalidRequest(
            "The request body is too intricate to be searched for 'model': give the model's name first in it, or in "
            "the header x-gateway-model."
        )  # (4)
    if written is None or written == b"null":
        raise InvalidRequest("The request body has no 'model'; 'gateway models list' shows what there is.")  # (2)
    try:
        return Ask(body, _model(json.loads(written)), stream)
    except (ValueError, RecursionError):
        raise InvalidRequest("'model' is not a name that a model can have.") from None  # (3)


def _check_text(body: bytes) -> Generator[None, None, None]:
    """Fail early, as an engine would after loading. Half a surrogate pair passes, as with Python's ``json``."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    for start in range(0, len(body) + 1, _SLICE_BYTES):
        piece = body[start : start + _SLICE_BYTES]
        try:
            decoder.decode(piece, final=start + _SLICE_BYTES > len(body))
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"The request body is not text in UTF-8 (near byte {start + error.start}): encode JSON as UTF-8."
            ) from None
        yield


def _model(name: object) -> str:
    if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
        raise InvalidRequest("'model' is not a name that a model can have.")  # (3)
    return name


class Turns:
    """Lets the parsing of bodies take turns, a slice each: with any number of them, the loop waits for one slice."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def read_ask(self, body: bytes, named: str | None, form: str | None = None) -> Ask:
        """``ask_in_slices``, interleaved with others."""
        reading = ask_in_slices(body, named, form)
        while True:
            async with self._turn:  # admitted in the order of arrival
                try:
                    next(reading)
                except StopIteration as done:
                    return cast(Ask, done.value)
                await asyncio.sleep(0)


def parse_document(body: bytes) -> object:
    """A small JSON document to be passed on. Raises ``InvalidRequest`` for one that cannot be, or is no JSON."""
    try:
        document = json.loads(body, parse_constant=_no_constant)
        _check(document, DEPTH_MAX)
    except (ValueError, RecursionError):  # also for text that is not Unicode, and numbers of thousands of digits
        raise InvalidRequest(f"The request body is not valid JSON, or nested over {DEPTH_MAX} deep.") from None
    return document


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _check(value: object, depth: int) -> None:
    if depth == 0:
        raise ValueError("too deep")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for name, member in value.items():
            _check(name, depth)
            _check(member, depth - 1)
    elif isinstance(value, list):
        for member in value:
            _check(member, depth - 1)
