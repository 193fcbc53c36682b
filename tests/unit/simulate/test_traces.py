"""The reader of traces, and the generators."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from pathlib import Path

import pytest

from gateway_plugin.errors import ConfigError
from serve.simulate.generators import SHAPES
from serve.simulate.times import CLASSES, class_of
from serve.simulate.traces import COLUMNS, LINE_MAX, Request, Trace, TraceFile, read_trace, write_trace

HEADER = ",".join(COLUMNS)


def written(folder: Path, *lines: str, name: str = "day.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_plain_and_a_packed_file_say_the_same(tmp_path: Path) -> None:
    plain = written(tmp_path, HEADER, "0.5,8b-01,10,20,u1", "1.25,32b-x,0,1,")
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))

    first, second = read_trace(plain), read_trace(packed)

    wanted = [Request(0.5, "8b-01", 10, 20, "u1"), Request(1.25, "32b-x", 0, 1, "")]
    assert list(first.arrivals) == list(second.arrivals) == wanted
    assert (first.name, second.name) == ("day", "packed")
    assert first.times == {"32b-x": CLASSES["32b"], "8b-01": CLASSES["8b"]}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "line 1: expected the columns"),
        (("arrival_s,model,user", "0,8b-1,u"), f"line 1: expected the columns {HEADER}, found 'arrival_s,model,user'"),
        ((HEADER,), "line 2: expected at least one request"),
        ((HEADER, "1,8b-1,1,1,u", "0.5,8b-1,1,1,u"), "line 3: expected arrival_s in rising order, found 0.5 after 1"),
        ((HEADER, "1,9b-1,1,1,u"), "line 2: unknown model '9b-1'; expected a name of a class: 32b, 70b, 8b, moe, vl"),
        ((HEADER, "1,8b-1,1,1"), "line 2: expected 5 values"),
        ((HEADER, "soon,8b-1,1,1,u"), "line 2: arrival_s: expected seconds of 0 or more, found 'soon'"),
        ((HEADER, "nan,8b-1,1,1,u"), "line 2: arrival_s: expected seconds of 0 or more, found 'nan'"),
        ((HEADER, "-1,8b-1,1,1,u"), "line 2: arrival_s"),
        ((HEADER, "1,8b-1,1.5,1,u"), "line 2: prompt_tokens: expected a whole number"),
        ((HEADER, "1,8b-1,1,99999999,u"), "line 2: output_tokens: expected a whole number"),
        ((HEADER, "1,8b-1,1,1," + "u" * LINE_MAX), f"line 2: expected at most {LINE_MAX} characters"),
    ],
)
def test_a_bad_file_is_one_line_with_file_line_and_what_was_expected(
    tmp_path: Path, lines: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    with pytest.raises(ConfigError) as raised:
        read_trace(path)

    assert str(raised.value).startswith(f"{path}, {said}")
    assert "\n" not in str(raised.value)


def test_a_model_that_a_catalog_does_not_have_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER, "1,8b-1,1,1,u", "2,8b-2,1,1,u")

    with pytest.raises(ConfigError, match=r"line 3: unknown model '8b-2'; expected one of 8b-1$"):
        read_trace(path, known={"8b-1": CLASSES["8b"]})


WHOLE = gzip.compress((HEADER + "\n" + "1,8b-1,1,1,u\n" * 50_000).encode())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "line 1: expected the columns", id="empty"),
        pytest.param(b"\x1f\x8bnot gzip at all", "line 1: expected CSV in UTF-8, plain or gzip", id="no-gzip"),
        pytest.param(b"\xff\xfe\x00", "line 1: expected CSV in UTF-8", id="no-text"),
        pytest.param(WHOLE[: len(WHOLE) // 2], "that can be read to its end: Compressed file ended", id="cut-off"),
        pytest.param(WHOLE[:10] + b"\xff" * 100, "line 1: expected CSV in UTF-8, plain or gzip", id="damaged"),
        pytest.param(WHOLE[:-8] + b"\0" * 8, "line 50002: expected CSV in UTF-8, plain or gzip", id="other-checksum"),
        pytest.param(gzip.compress(b""), "line 1: expected the columns", id="empty-gzip"),
        pytest.param(f'{HEADER}\n1,"8b-1,1,1,u\n'.encode(), "line 2: expected CSV", id="open-quote"),
        pytest.param(f"{HEADER}\n1,8b-1,1,1,u\n\n".encode(), "line 3: expected 5 values", id="blank-line"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.csv.gz"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as raised:
        read_trace(path)

    assert str(raised.value).startswith(f"{path}, line ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_a_folder_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(ConfigError, match=rf"^{path}, line 1: .*(Is a directory|No such file)"):
            read_trace(path)


def test_a_file_is_read_without_being_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as out:
        out.write(HEADER + "\n")
        for number in range(20_000):  # 100 bytes a request would be 2 MB
            out.write(f"{number},8b-{number % 40:02},100,20,user{number % 100}\n")

    tracemalloc.start()
    try:
        count = sum(1 for _ in TraceFile(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 500_000


def test_what_is_written_is_read(tmp_path: Path) -> None:
    requests = [Request(0.5, "8b-01", 10, 20, "u,1"), Request(2.0, "vl-2", 3, 4, "")]
    out = io.StringIO()

    assert write_trace(requests, out) == 2

    path = tmp_path / "made.csv"
    path.write_text(out.getvalue(), encoding="utf-8")
    assert list(read_trace(path).arrivals) == requests


def content(trace: Trace) -> tuple[object, ...]:
    return tuple(trace.arrivals), trace.sessions, trace.times


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_gives_the_same_trace_again(shape: str) -> None:
    first = SHAPES[shape](3)

    assert first.name == shape
    assert content(first) == content(SHAPES[shape](3))
    if not shape.startswith("llmux"):  # those are as published
        assert content(first) != content(SHAPES[shape](4))
    times = [request.at for request in first.arrivals]
    assert times == sorted(times)


def test_llmuxs_profiles_have_190_requests() -> None:
    traces = [SHAPES[shape](1) for shape in SHAPES if shape.startswith("llmux")]
    closed = sum(len(batch) for trace in traces for session in trace.sessions for batch in session.batches)

    assert closed + sum(len(tuple(trace.arrivals)) for trace in traces) == 190


def test_the_map_has_2000_prompts_and_the_greedy_user_100_for_one_of_another() -> None:
    mapped = SHAPES["map-2000"](1)
    greedy = [request.user for request in SHAPES["greedy-100"](1).arrivals]
    others = len(greedy) - greedy.count("greedy")

    assert sum(len(session.batches) for session in mapped.sessions) == 2000
    assert 60 < greedy.count("greedy") / (others / 9) < 150


def test_a_class_is_the_first_part_of_a_name() -> None:
    assert class_of("70b-chat").gpus == 4
    with pytest.raises(ConfigError, match="model 'gpt' is of no class"):
        class_of("gpt")
