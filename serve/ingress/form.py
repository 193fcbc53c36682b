"""Finds a few fields of a form (``multipart/form-data``, RFC 7578) without a copy of its files, in slices.

The parser is python-multipart's, as in the engines, which are Starlette applications: what is a field or a file here is
one there. A name is never read out of a file's content, unless that contains the form's own boundary, which its sender
chose.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

PARTS_MAX = 64
"""Fields and files of one form; the paths that take one have some twenty options."""
VALUE_MAX = 1024
"""A longer value is cut here: it is neither a name nor a flag."""
_BOUNDARY_MAX = 70
"""RFC 2046, 5.1.1"""
_SLICE_BYTES = 64 << 10
"""Parsed in some milliseconds for any content."""

# The parser logs every malformed form; the caller gets the message.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class NoForm(ValueError):
    """The body is no valid form; the message says why, for the caller."""


Fields = dict[str, bytes]


def boundary_of(content_type: str) -> bytes:
    """The boundary in a form's ``Content-Type``. Raises ``NoForm``."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise NoForm("this path takes a form, with the header 'Content-Type: multipart/form-data; boundary=...'")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= _BOUNDARY_MAX:
        raise NoForm(
            f"the header Content-Type has no boundary of 1 to {_BOUNDARY_MAX} characters; do not set it by hand, the "
            "HTTP client writes it with the form"
        )
    return boundary


def find_fields(body: bytes, content_type: str, names: Collection[str]) -> Generator[None, None, Fields]:
    """Find the fields ``names`` in the form ``body``; yields after every slice of the work.

    Raises:
        NoForm: (1) no form by its header, (2) the boundary is in it too often, (3) malformed, or a part without a name,
            (4) it ends before its last boundary.
    """
    boundary = boundary_of(content_type)  # (1)
    reader = _Reader(names)
    parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type] # its type lists optional keys
    line = b"\r\n--" + boundary
    lines = 0
    for start in range(0, len(body), _SLICE_BYTES):
        end = start + _SLICE_BYTES
        lines += body.count(line, start, end + len(line) - 1)
        if lines > PARTS_MAX:  # (2): each costs the parser a few steps, a part's own content too
            raise NoForm(f"it has more than {PARTS_MAX} parts")
        padded = parser.state == MultipartState.BOUNDARY_PADDING
        try:
            parser.write(body[start:end])
        except FormParserError:
            raise NoForm("its parts are malformed, or not separated by its Content-Type's boundary") from None
        if padded and parser.state == MultipartState.BOUNDARY_PADDING:
            raise NoForm("it has a line of blanks without end")  # (3)
        yield
    if not reader.ended:
        raise NoForm("it is cut off, or its boundary is not the one that its Content-Type says")  # (4)
    return reader.fields


class _Reader:
    """Receives what the parser finds, and keeps the fields that are wanted."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self.fields: Fields = {}
        self.ended = False
        self._header = self._value = b""
        self._disposition: bytes | None = None
        self._kept: bytearray | None = None
        """Value of the field that is being read, if it is wanted."""
        self._name = ""

    def callbacks(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}

    def on_part_begin(self) -> None:
        self._disposition = self._kept = None

    def on_header_begin(self) -> None:
        self._header = self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            if self._disposition is not None:
                raise NoForm("one of its parts has two headers Content-Disposition")
            self._disposition = self._value

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header((self._disposition or b"").decode("latin-1"))
        name = options.get(b"name")
        if kind != b"form-data" or not name:
            raise NoForm("one of its parts has no name: 'Content-Disposition: form-data; name=\"...\"'")
        self._name = name.decode("latin-1")
        if self._name not in self._names:
            return
        if b"filename" in options:
            raise NoForm(f"'{self._name}' is a file in it, and must be a plain field")
        if self._name in self.fields:
            raise NoForm(f"it has '{self._name}' more than once")
        self._kept = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._kept is not None and len(self._kept) < VALUE_MAX:
            self._kept += data[start : min(end, start + VALUE_MAX)]

    def on_part_end(self) -> None:
        if self._kept is not None:
            self.fields[self._name] = bytes(self._kept[:VALUE_MAX])

    def on_end(self) -> None:
        self.ended = True
