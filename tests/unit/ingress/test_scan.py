"""Finding the model in a body: what is found, what it costs, and that it is the same as what the edge finds."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc

import pytest

from gateway_plugin.errors import InvalidRequest
from serve.ingress import scan as scanning
from serve.ingress.body import ask_in_slices
from serve.ingress.scan import Found, Malformed, scan
from tests.support.slices import finished, parse_ask

MIB = 1 << 20


def found(body: bytes, *names: str) -> Found:
    return finished(scan(body, names or ("model", "stream")))


def some_value(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [some_value(rng, depth - 1) for _ in range(rng.randrange(30))]
    if kind == 7:
        return {some_text(rng): some_value(rng, depth - 1) for _ in range(rng.randrange(30))}
    simple: tuple[object, ...] = (None, True, -1.5e-7, rng.randrange(10**12), some_text(rng), "x" * rng.randrange(9000))
    return simple[kind]


def some_text(rng: random.Random) -> str:
    return "".join(rng.choice('ab"\\{}[]:,\n\tä€😀 "model"') for _ in range(rng.randrange(40)))


@pytest.mark.parametrize("seed", range(60))
def test_finds_in_any_object_what_pythons_json_finds(seed: int) -> None:
    rng = random.Random(seed)
    document = {some_text(rng): some_value(rng, 3) for _ in range(rng.randrange(8))}
    if seed % 3:
        document["model"] = some_value(rng, 2)
    document |= {f"z{i}": some_value(rng, 3) for i in range(rng.randrange(3))}
    if seed % 2:
        document["stream"] = True
    body = json.dumps(document, ensure_ascii=bool(seed % 5), indent=rng.choice((None, 1))).encode()
    values = found(body).values
    assert set(values) == {name for name in ("model", "stream") if name in document}
    for name, written in values.items():
        if len(written) < 1024:
            assert json.loads(written) == document[name]


def test_of_two_models_the_first_counts_as_at_the_edge() -> None:
    assert parse_ask(b'{"model": "a", "model": "b"}', None).model == "a"
    assert parse_ask(b'{"x": {"model": "c"}, "mod\\u0065l": "b", "model": "a"}', None).model == "a"
    assert parse_ask(b'{"model": "a"}', "named").model == "named"
    assert parse_ask(b'\xef\xbb\xbf{"model": "a", "stream": true}', None).stream
    assert not parse_ask(b'{"model": "a", "stream": "true"}', None).stream


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"null", b"[]", b'"model"', b"{", b'{"', b'{"a', b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}',
     b'{"a":[}', b'{"a":[1,2', b'{"a":"\\"}', b"{a:1}", b"{1:2}", b'{"a" 1}', b'{"a":}', b'{,"a":1}', b'{"a":1 "b":2}',
     b'{"a":{"b":"c}', b'{"a":[[[[', b"\x00{}", b'{"a":' + b"[" * 50_000],
)  # fmt: skip
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        found(body)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse_ask(body, None)


@pytest.mark.parametrize(
    "unit",
    [b"{},", b"[[[]]],", b'"' + b'\\"' * 30 + b'",', b'"",', b"1,", b"[1,2],", b'{"a":', b"[", b'{"a":{"b":1}},',
     b'"' + b"x" * 70_000 + b'",', b"\\\\", b"  ", b'{"role":"user","content":"hello"},'],
    ids=repr,
)  # fmt: skip
def test_work_is_bounded_and_sliced_and_memory_flat(unit: bytes) -> None:
    """Whatever 4 MiB are made of: no slice goes far, nothing is kept."""
    _bounded(b'{"a":[' + unit * (4 * MIB // len(unit)) + b'0],"model":"m"}')


@pytest.mark.parametrize(
    "unit", [b'"":1,', b'"":"",', b'"a":1,', b'"":{},', b'"" : [] ,', b'"":"' + b"x" * 50 + b'",'], ids=repr
)
def test_work_is_bounded_whatever_the_outermost_object_is_made_of(unit: bytes) -> None:
    _bounded(b"{" + unit * (4 * MIB // len(unit)) + b'"model":"m"}')


def _bounded(body: bytes) -> None:
    walk = scanning._Walk(body)
    steps: list[int] = [0]
    places: list[int] = [0]
    tracemalloc.start()
    try:
        slices = walk.members(("model",), {})
        while True:
            try:
                next(slices)
            except StopIteration:
                break
            except (Malformed, scanning._TooLong):
                break
            places.append(walk._at)
            steps.append(walk._steps)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB // 4
    assert len(places) >= 2
    assert max(end - begin for begin, end in itertools.pairwise((*places, walk._at))) <= 3 * MIB
    assert max(end - begin for begin, end in itertools.pairwise(steps)) <= scanning._SLICE_STEPS
    assert walk._steps <= scanning.STEPS_MAX + 1
    assert walk._at <= 3 * MIB * (walk._steps + 1), "work that is not counted"


def test_a_body_that_would_take_too_long_is_told_where_to_say_its_model() -> None:
    intricate = b'{"a":[' + b"[[[]]]," * 300_000 + b'0],"model":"m","stream":true}'
    assert found(intricate) == Found({}, whole=False)
    with pytest.raises(InvalidRequest, match="x-gateway-model"):
        parse_ask(intricate, None)
    assert parse_ask(intricate, "m").model == "m"
    first = b'{"model":"m",' + intricate[1:]
    assert parse_ask(first, None).model == "m"


def test_a_large_body_as_the_openai_client_writes_it() -> None:
    """Messages first, the model last, a picture of some megabytes in the middle."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 500_000}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": f'say "{i}"'}, picture][: 1 + (i == 7)]}
        for i in range(5000)
    ]
    body = json.dumps({"messages": messages, "model": "org/m", "stream": True}).encode()
    slices = 0
    reading = ask_in_slices(body, None)
    while True:
        try:
            next(reading)
        except StopIteration as done:
            ask = done.value
            break
        slices += 1
    assert (ask.model, ask.stream) == ("org/m", True)
    assert slices >= len(body) // (3 * MIB)
