"""Finds a few keys of a large JSON object without building objects of it: linear, in flat memory, in slices.

It looks for members of the outermost object. Of several with one name the first counts, and a name is found only where
it is written without escapes: both as at the edge (HAProxy's ``json_query``), so that a request is not routed by one
name and waited for by another. Deeper levels are skipped and hardly checked: that is the engine's part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator
from dataclasses import dataclass

STEPS_MAX = 100_000
"""Work for one body, in matches of the patterns below: half a second or so for any content.

Brackets around brackets cost a step each, and so does each member of the outermost object; text, numbers, and lists or
objects of them cost one for many.
"""
_SLICE_STEPS = 2_000
_SLICE_BYTES = 256 << 10
_VALUE_MAX = 1024
"""A longer value is of no use to a caller."""

# Every repeat is possessive, so that nothing is tried twice, and bounded: one match takes at most 2 MiB.
_PLAIN = rb'[^"{}\[\]]{1,4096}+'
_TEXT = rb'"(?:[^"\\]{1,4096}+|\\.){0,8}+"'
_FLAT = rb'(?:[^"{}\[\]]{1,2048}+|"(?:[^"\\]{1,256}+|\\.){0,8}+"){0,16}+'
_NESTED = rb"(?:" + _PLAIN + rb"|" + _TEXT + rb"|\{" + _FLAT + rb"\}|\[" + _FLAT + rb"\]){1,64}+"
_SAME_DEPTH = re.compile(_NESTED, re.DOTALL)
_IN_TEXT = re.compile(rb'(?:[^"\\]{1,4096}+|\\.){1,256}+', re.DOTALL)
_BLANKS = re.compile(rb"[ \t\n\r]{1,65536}+")
_BARE = re.compile(rb"[-+.0-9A-Za-z]{1,64}+")


class Malformed(ValueError):
    """The body is no JSON object, as far as it was read."""


@dataclass(frozen=True)
class Found:
    """Result of a scan."""

    values: dict[str, bytes]
    """Name -> value as it is written."""
    whole: bool
    """Whether it looked as far as it had to; if not, the body is too intricate."""


class _TooLong(Exception):
    """``STEPS_MAX``."""


Slices = Generator[None, None, None]


def scan(body: bytes, names: Collection[str]) -> Generator[None, None, Found]:
    """Find ``names`` in the object ``body``; yields after every slice of the work.

    Raises:
        Malformed: it is no JSON object.
    """
    values: dict[str, bytes] = {}
    walk = _Walk(body)
    try:
        yield from walk.members(names, values)
    except _TooLong:
        return Found(values, whole=False)
    return Found(values, whole=True)


class _Walk:
    """A position in the body, and the steps taken to get there."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 3 if body.startswith(b"\xef\xbb\xbf") else 0
        self._steps = 0
        self._slice = (0, 0)
        """Steps and place at which the slice began."""

    def members(self, names: Collection[str], values: dict[str, bytes]) -> Slices:
        """The outermost object, up to the last of ``names`` or its end."""
        yield from self._expect(b"{")
        if self._byte() == b"}":
            return
        while True:
            begin = self._at
            yield from self._text()
            name = self._written(begin)[1:-1].decode("latin-1")
            yield from self._blanks()
            yield from self._expect(b":")
            begin = self._at
            yield from self._value()
            if name in names and name not in values:
                values[name] = self._written(begin)
                if len(values) == len(names):
                    return
            yield from self._pause()  # there may be millions, each of a few bytes
            yield from self._blanks()
            if self._byte() == b"}":
                return
            yield from self._expect(b",")

    def _written(self, begin: int) -> bytes:
        return self._body[begin : min(self._at, begin + _VALUE_MAX)]

    def _value(self) -> Slices:
        byte = self._byte()
        if byte == b'"':
            yield from self._text()
        elif byte in (b"{", b"["):
            yield from self._nest()
        elif not self._take(_BARE):
            raise Malformed

    def _nest(self) -> Slices:
        depth = 0
        while True:
            byte = self._byte()
            if byte in (b"{", b"["):
                depth, self._at = depth + 1, self._at + 1
            elif byte in (b"}", b"]"):
                depth, self._at = depth - 1, self._at + 1
                if depth == 0:
                    return
            elif not self._take(_SAME_DEPTH):
                yield from self._text()
                continue
            yield from self._pause()
            self._take(_SAME_DEPTH)

    def _text(self) -> Slices:
        if self._byte() != b'"':
            raise Malformed
        self._at += 1
        while self._take(_IN_TEXT):
            yield from self._pause()
        if self._byte() != b'"':
            raise Malformed
        self._at += 1

    def _expect(self, byte: bytes) -> Slices:
        yield from self._blanks()
        if self._byte() != byte:
            raise Malformed
        self._at += 1
        yield from self._blanks()

    def _blanks(self) -> Slices:
        while self._take(_BLANKS):
            yield from self._pause()

    def _byte(self) -> bytes:
        return self._body[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[bytes]) -> bool:
        found = pattern.match(self._body, self._at)
        if found is None:
            return False
        self._at = found.end()
        return True

    def _pause(self) -> Slices:
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise _TooLong
        steps, place = self._slice
        if self._steps - steps >= _SLICE_STEPS or self._at - place >= _SLICE_BYTES:
            self._slice = (self._steps, self._at)
            yield
