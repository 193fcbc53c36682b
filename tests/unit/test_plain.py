"""Nothing that a terminal obeys gets through, whatever it is cut into, and what people read does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.plain import PlainStream, plain

ESC, ST, C1_ST, BEL = "\x1b", "\x1b\\", "\x9c", "\x07"

SEQUENCES = [
    f"{ESC}[2J",
    f"{ESC}[31;1m",
    f"{ESC}[?1049h",
    f"{ESC}[>0q",
    f"{ESC}[ q",
    "\x9b2J",
    f"{ESC}]52;c;Y3VybCBldmlsfHNo{ST}",
    f"{ESC}]0;owned{BEL}",
    f"{ESC}]8;;http://evil.example/{ST}",
    f"\x9d0;owned{C1_ST}",
    f"{ESC}P$q q{ST}",
    f"\x90+q544e{C1_ST}",
    f"{ESC}_Gf=24;AAAA{ST}",
    f"{ESC}^private{ST}",
    f"{ESC}Xstring{ST}",
    f"{ESC}c",
    f"{ESC}7",
    f"{ESC}(B",
    f"{ESC}#8",
]
visible = st.text(
    st.characters(
        exclude_categories=("Cc", "Cs"), exclude_characters="\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )
    | st.sampled_from("\n\t")
)
anything = st.lists(
    st.sampled_from(SEQUENCES)
    | st.sampled_from(
        [ESC, f"{ESC}]", f"{ESC}P", f"{ESC}[", f"{ESC}[1;", "\x9b", "\x9d", "\r", "\r\n", BEL, "\\", "\x9c"]
    )
    | st.text(st.characters(codec=None), max_size=6)
).map("".join)


def controls(text: str) -> list[str]:
    return [c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff"]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_each_sequence_goes_whole_and_takes_nothing_with_it(sequence: str) -> None:
    assert plain(f"before {sequence}after\n") == "before after\n"


@given(anything)
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    assert controls(plain(text)) == []


@given(visible)
def test_what_people_read_is_kept(text: str) -> None:
    assert plain(text) == text


@given(st.lists(visible | st.sampled_from(SEQUENCES)))
def test_between_sequences_too(parts: list[str]) -> None:
    assert plain("".join(parts)) == "".join(part for part in parts if part not in SEQUENCES)


@given(anything, st.integers(1, 5))
def test_pieces_of_any_size_show_what_the_whole_shows(text: str, size: int) -> None:
    stream = PlainStream()
    pieces = [stream.feed(text[at : at + size]) for at in range(0, len(text), size)]
    assert "".join(pieces) + stream.end() == plain(text)


@pytest.mark.parametrize(
    "begin", [f"{ESC}{' ' * 15}", f"{ESC}[{'1' * 63}", f"{ESC}[{'1' * 64}{' ' * 63}", f"{ESC}]{'x' * 4095}"]
)
@pytest.mark.parametrize("more", range(4))
@pytest.mark.parametrize("end", ["", "m", BEL, ST, "\n"])
def test_pieces_and_whole_agree_on_what_is_too_long(begin: str, more: int, end: str) -> None:
    text = begin + begin[-1] * more + end + "after"
    stream = PlainStream()
    assert "".join(map(stream.feed, text)) + stream.end() == plain(text)


def test_nothing_is_written_over_and_reversals_go() -> None:
    assert plain("rm -rf /\rharmless\r\nnext") == "rm -rf /\nharmless\nnext"
    assert plain("a\u202eb\u2066c") == "abc"
    assert plain("\ud83d x") == "\ufffd x"


def test_a_sequence_without_an_end_hides_nothing() -> None:
    long = "x" * 5000
    assert plain(f"{ESC}]0;{long}") == f"0;{long}"
    stream = PlainStream()
    assert stream.feed(f"{ESC}]0;{long}") == f"0;{long}"
    assert stream.feed(f"{ESC}]0;title") + stream.feed("\nnext") == "0;title\nnext"


def test_a_piece_without_sequences_is_shown_at_once() -> None:
    stream = PlainStream()
    assert stream.feed("Paris is ") == "Paris is "
    assert stream.feed(f"nice{ESC}") == "nice"
    assert stream.feed("[31m.") == "."
