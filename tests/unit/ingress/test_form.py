"""The model's name in a form: found wherever it stands, and never taken out of a file."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from gateway_plugin.errors import InvalidRequest
from serve.ingress.body import Ask, Turns
from serve.ingress.form import PARTS_MAX
from tests.support.slices import parse_ask

BOUNDARY = "----form"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, content: bytes, filename: str | None = None, header: str = "Content-Disposition") -> bytes:
    more = f'; filename="{filename}"' if filename is not None else ""
    return f'{header}: form-data; name="{name}"{more}\r\n\r\n'.encode() + content


def form(*parts: bytes, end: bytes = b"--\r\n", boundary: str = BOUNDARY) -> bytes:
    line = b"--" + boundary.encode()
    return b"".join(line + b"\r\n" + one + b"\r\n" for one in parts) + line + end


SPEECH = part("file", b"RIFF....", "speech.wav")
MODEL = part("model", b"whisper")


def test_the_name_is_found_before_and_behind_a_large_file() -> None:
    large = part("file", b"\r\n--\r\n-" * 500_000, "long.wav")
    for parts in ((MODEL, large), (large, MODEL)):
        body = form(*parts)
        assert parse_ask(body, None, FORM) == Ask(body, "whisper", stream=False)


def test_it_reads_what_clients_write() -> None:
    request = httpx.Request(
        "POST", "http://g", data={"model": "openai/whisper-tiny", "stream": "true"}, files={"file": ("a.wav", b"abc")}
    )
    asked = parse_ask(request.read(), None, request.headers["content-type"])
    assert (asked.model, asked.stream) == ("openai/whisper-tiny", True)


def test_a_name_in_the_header_needs_none_in_the_form() -> None:
    assert parse_ask(form(SPEECH), "whisper", FORM).model == "whisper"
    assert parse_ask(form(SPEECH, part("model", b"another")), "whisper", FORM).model == "whisper"


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        (form(SPEECH), FORM, "no field 'model'"),
        (form(), FORM, "no field 'model'"),
        (form(MODEL, SPEECH, MODEL), FORM, "'model' more than once"),
        (form(part("model", b"whisper", "model.txt")), FORM, "'model' is a file"),
        (form(part("model", b"")), FORM, "not a name"),
        (form(part("model", b"a;b")), FORM, "not a name"),
        (form(part("model", b"m" * 2000)), FORM, "not a name"),
        (form(part("model", "glacier\xe4".encode())), FORM, "not a name"),
        (form(MODEL, b"Content-Disposition: form-data\r\n\r\nx"), FORM, "no name"),
        (form(MODEL, b'Content-Disposition: form-data; name=""\r\n\r\nx'), FORM, "no name"),
        (form(MODEL, b"Content-Type: text/plain\r\n\r\nx"), FORM, "no name"),
        (form(MODEL, b'Content-Disposition: attachment; name="a"\r\n\r\nx'), FORM, "no name"),
        (form(b'Content-Disposition: form-data; name="a"\r\n' + MODEL), FORM, "two headers"),
        (form(MODEL, SPEECH)[:-8], FORM, "cut off"),
        (form(SPEECH)[:40], FORM, "cut off"),
        (b"", FORM, "cut off"),
        (form(MODEL, boundary="another"), FORM, "not separated by"),
        (form(MODEL, b"no header\r\n\r\nx"), FORM, "malformed"),
        (form(MODEL, b"A: " + b"x" * 10_000 + b"\r\n\r\nx"), FORM, "malformed"),
        (form(MODEL, b"A: b\r\n" * 20 + b"\r\nx"), FORM, "malformed"),
        (b'{"model": "whisper"}', FORM, "malformed"),
        (form(*(part("a", b"") for _ in range(PARTS_MAX + 2))), FORM, "more than"),
        (form(MODEL), "application/json", "takes a form"),
        (form(MODEL), "multipart/mixed; boundary=----form", "takes a form"),
        (form(MODEL), "", "takes a form"),
        (form(MODEL), "multipart/form-data", "no boundary"),
        (form(MODEL), "multipart/form-data; boundary=", "no boundary"),
        (form(MODEL), "multipart/form-data; boundary=" + "b" * 71, "no boundary"),
    ],
)
def test_what_is_no_form_is_refused_with_the_reason(body: bytes, content_type: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        parse_ask(body, None, content_type)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    "body",
    [
        form(SPEECH, MODEL).replace(BOUNDARY.encode() + b"\r\n", BOUNDARY.encode() + b" " * (8 << 20) + b"\r\n", 1),
        form(part("file", f"\r\n--{BOUNDARY}x".encode() * 500_000, "f"), MODEL),
        form(part("file", f"\r\n--{BOUNDARY[:-1]}".encode() * 500_000, "f"), MODEL),
        form(part("file", b"\r" * (8 << 20), "f"), MODEL),
        b"\r\n" * (4 << 20) + form(MODEL),
        form(MODEL) + b"-" * (8 << 20),
        form(*(part("a", b"") for _ in range(100_000))),
    ],
    ids=["blanks", "false-ends", "near-ends", "returns", "beginning", "epilogue", "parts"],
)
def test_no_content_costs_more_than_a_moment(body: bytes) -> None:
    began = time.process_time()
    with contextlib.suppress(InvalidRequest):
        parse_ask(body, None, FORM)
    assert time.process_time() - began < 0.5


async def test_others_have_their_turn_while_a_form_is_read() -> None:
    body = form(part("file", b"x" * (4 << 20), "f"), MODEL)
    assert (await Turns().read_ask(body, None, FORM)).model == "whisper"


names = st.text(st.characters(codec="ascii", exclude_characters='"\\', min_codepoint=32, max_codepoint=126), min_size=1)
contents = st.binary(max_size=200) | st.sampled_from(
    [b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nevil\r\n', b"--" + BOUNDARY.encode(), b"\r\n--"]
)


@given(st.lists(st.tuples(names, contents, st.booleans()), max_size=6), st.data())
def test_a_name_inside_a_file_is_none(parts: list[tuple[str, bytes, bool]], data: st.DataObject) -> None:
    """Whatever files and other fields hold: a name counts only in a field of its own, or as none at all."""
    line = f"\r\n--{BOUNDARY}".encode()
    kept = [(n, c, f) for n, c, f in parts if n not in ("model", "stream") and line not in b"\r\n" + c + b"\r\n"]
    made = [part(n, c, "f" if f else None) for n, c, f in kept]
    with pytest.raises(InvalidRequest, match="no field 'model'"):
        parse_ask(form(*made), None, FORM)
    made.insert(data.draw(st.integers(0, len(made))), MODEL)
    assert parse_ask(form(*made), None, FORM).model == "whisper"


words = (b"\r\n", b"\n", b"--", b":", b"Content-Disposition", b"form-data", b";", b' name="model"', b' filename="f"')
others = (b"--" + BOUNDARY.encode(), b"whisper", b" ", b"\0", b"\xff", b'"', b"\\")
pieces = st.sampled_from([*words, *others]) | st.binary(max_size=20)
headers = st.sampled_from([FORM, "multipart/form-data"]) | st.text(max_size=60)


@given(st.lists(pieces, max_size=40).map(b"".join), headers)
def test_no_body_and_no_header_break_it(body: bytes, content_type: str) -> None:
    content_type = content_type.encode("latin-1", "ignore").decode("latin-1")  # as headers come
    try:
        asked = parse_ask(body, None, content_type)
    except InvalidRequest:
        return
    assert asked.body == body
    assert asked.model.encode() in body


class Whole(Request):
    """A request whose body is there."""

    def __init__(self, body: bytes) -> None:
        headers = [(b"content-type", FORM.encode())]
        super().__init__({"type": "http", "method": "POST", "headers": headers})
        self._body = body


fields = st.sampled_from(
    [MODEL, SPEECH, part("prompt", b"x"), part("a", b"", ""), b"Content-Type: text/plain\r\n" + MODEL]
)


@given(st.lists(fields | st.lists(pieces, max_size=8).map(b"".join), max_size=5).map(lambda parts: form(*parts)))
def test_a_name_that_is_found_is_the_one_that_an_engine_reads(body: bytes) -> None:
    """By Starlette's own reading of forms, which vLLM and its like use."""

    async def read() -> object:
        async with Whole(body).form() as found:
            return found.get("model")

    with contextlib.suppress(InvalidRequest):
        assert parse_ask(body, None, FORM).model == asyncio.run(read())


@given(st.binary(max_size=300))
def test_a_form_of_noise_breaks_nothing(noise: bytes) -> None:
    for body in (noise, form(noise), form(MODEL, noise), form(MODEL) + noise):
        with contextlib.suppress(InvalidRequest):
            parse_ask(body, None, FORM)
