"""Removes terminal control sequences from text of models, engines, schedulers and logs: pure.

A model repeats text of the documents that it gets, and a terminal that reads ``ESC ]52;...`` fills the clipboard. The
result has no control character but newline and tab.
"""

from __future__ import annotations

import re

_HELD_MAX = 4096
"""Of a sequence without an end only the beginning is dropped: it must not hide all that follows."""

_STRING = r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])"  # OSC, DCS, SOS, PM, APC
_STRING_BODY = rf"[^\x00-\x1f\x7f-\x9f]{{0,{_HELD_MAX}}}"
_CSI = r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,64}"
_SHORT = r"\x1b[ -/]{0,16}"
_BIDI = "\u202a-\u202e\u2066-\u2069"  # reverse the order of the following text, so that it reads differently

_DROPPED = re.compile(
    rf"{_STRING}{_STRING_BODY}(?:\x07|\x1b\\|\x9c)|{_CSI}[@-~]|{_SHORT}[0-~]"
    rf"|\r\n?|[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}]|[\ud800-\udfff]"
)
_UNFINISHED = re.compile(rf"(?:\r|{_STRING}{_STRING_BODY}\x1b?|{_CSI}|{_SHORT})\Z")


def plain(text: str) -> str:
    """``text`` without escape sequences (whole), control characters and reversals of direction.

    A carriage return becomes a newline: the text after it does not overwrite the text before. Halves of a surrogate
    pair, which no output accepts, become U+FFFD.
    """
    return _DROPPED.sub(_instead, text)


def _instead(found: re.Match[str]) -> str:
    if found[0][0] == "\r":
        return "\n"
    return "\ufffd" if "\ud800" <= found[0] <= "\udfff" else ""


class PlainStream:
    """``plain`` for a stream: a sequence may begin in one piece and end in another."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that can be shown now."""
        text = self._held + piece
        unfinished = _UNFINISHED.search(text)
        at = unfinished.start() if unfinished else len(text)
        self._held = text[at:]
        return plain(text[:at])

    def end(self) -> str:
        """The text held back, at the end of the stream."""
        text, self._held = self._held, ""
        return plain(text)
