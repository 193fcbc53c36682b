"""``gateway usage export-trace``: the usage log as a trace that the simulator reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.catalog import catalog_document, parse_catalog
from gateway_plugin.cli.main import cli
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.usage import CLASSES, classified, read_log
from serve.simulate import times
from serve.simulate.runs import Cell, run
from serve.simulate.traces import COLUMNS, read_trace

CATALOG = parse_catalog(
    {
        "models": {
            "Qwen/Qwen3-8B": {"source": "x", "gpus": 1, "memory_gib": 20, "aliases": ["small"]},
            "big": {"source": "x", "gpus": 4, "memory_gib": 40},
            "huge": {"source": "x", "gpus": 16, "memory_gib": 70},
        }
    },
    "catalog",
)


def a_line(time: float = 1000.0, **fields: Any) -> str:
    return json.dumps(
        {
            "time": time, "request": "r", "key": "ann", "caller": "-", "model": "Qwen/Qwen3-8B", "method": "POST",
            "path": "/v1/chat/completions", "status": 200, "bytes_in": 900, "bytes_out": 1100, "ms": 500,
            "first_byte_ms": 500, "where": "slot0/e0", "retries": "0", "end": "--", **fields,
        }
    ) + "\n"  # fmt: skip


def export(state: Path, *arguments: str) -> Result:
    layout = Layout(state)
    layout.logs.mkdir(parents=True, exist_ok=True)
    layout.catalog_json.write_text(json.dumps(catalog_document(CATALOG)))
    runner = CliRunner(env={"GATEWAY_URL": ""})
    return runner.invoke(cli, ["--state", str(state), "usage", "export-trace", *arguments], catch_exceptions=False)


def test_the_simulator_reads_what_is_exported(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "state")
    layout.logs.mkdir(parents=True)
    layout.usage_log.write_text(a_line(1030.25, model="small", caller="bob") + a_line(1010.5) + "{cut o")
    layout.usage_log.with_name("usage.jsonl.1.gz").write_bytes(gzip.compress(a_line(1000, model="big").encode()))
    out = tmp_path / "day.csv.gz"
    done = export(layout.state, "--out", str(out))
    assert done.exit_code == 0
    assert "3 requests to" in done.stdout
    assert "unreadable: 1" in done.stderr
    trace = read_trace(out)
    requests = list(trace.arrivals)
    assert [(one.at, one.model) for one in requests] == [
        (0.0, "70b-big"), (10.5, "8b-Qwen/Qwen3-8B"), (30.25, "8b-Qwen/Qwen3-8B"),
    ]  # fmt: skip
    assert {(one.prompt_tokens, one.output_tokens) for one in requests} == {(100, 100)}
    first, second, third = (one.user for one in requests)
    assert first == second != third
    assert "ann" not in gzip.decompress(out.read_bytes()).decode()
    assert run(Cell(str(out), "fifo", gpus=8)) is not None


def test_names_are_kept_where_asked_and_pseudonyms_stay_the_same(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.logs.mkdir(parents=True)
    layout.usage_log.write_text(a_line() + a_line(1001, caller="bob"))
    named = [line.split(",") for line in export(tmp_path, "--names").stdout.splitlines()]
    assert tuple(named[0]) == COLUMNS
    assert [row[-1] for row in named[1:]] == ["ann", "bob"]
    first, again = export(tmp_path).stdout, export(tmp_path).stdout
    assert first == again
    assert layout.pseudonyms.stat().st_mode & 0o777 == 0o600
    layout.pseudonyms.unlink()
    assert export(tmp_path).stdout != first, "not to be guessed from a list of names"


def test_what_is_no_work_of_a_model_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    log.write_text(
        a_line(1, status=429) + a_line(2, status=499) + a_line(3, status=503) + a_line(4, model="-")
        + a_line(5, method="GET") + a_line(6, status=-1) + "\n" + json.dumps({"time": 7}) + "\n"
    )  # fmt: skip
    found = read_log([log])
    assert [used.time for used in found.requests] == [2, 3, 6]
    assert found.unreadable == 2
    assert [used.time for used in read_log([log], since=3.0).requests] == [3, 6]


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"bytes_out": 4700}, 1000),
        ({"bytes_out": 24000, "ms": 3000, "first_byte_ms": 40}, 100),
        ({"path": "/v1/embeddings", "bytes_out": 90000}, 0),
        ({"status": -1, "bytes_out": 0, "first_byte_ms": -1}, 0),
        ({"path": "/v1/audio/speech", "bytes_out": 90000}, 0),
        ({"path": "/v1/images/generations", "bytes_out": 90000}, 0),
    ],
    ids=["whole", "stream", "embedding", "gone", "speech", "picture"],
)
def test_tokens_are_estimated_from_bytes(tmp_path: Path, fields: dict[str, Any], output: int) -> None:
    log = tmp_path / "usage.jsonl"
    log.write_text(a_line(**fields))
    (used,) = read_log([log]).requests
    assert (used.prompt_tokens, used.output_tokens) == (100, output)


def test_a_file_is_no_prompt(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    log.write_text(a_line(path="/v1/audio/transcriptions", bytes_in=20 << 20, bytes_out=4700))
    (used,) = read_log([log]).requests
    assert (used.prompt_tokens, used.output_tokens) == (1, 1000)


def test_a_models_class_is_chosen_named_or_that_of_its_size(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    log.write_text("".join(a_line(model=name) for name in ("small", "big", "huge", "moe-x", "unknown")))
    requests = read_log([log]).requests
    named, classes = classified(requests, CATALOG.models, {"big": "32b"})
    assert classes == {"Qwen/Qwen3-8B": "8b", "big": "32b", "huge": "moe", "moe-x": "moe", "unknown": "8b"}
    assert [used.model for used in named] == ["8b-Qwen/Qwen3-8B", "32b-big", "moe-huge", "moe-x", "8b-unknown"]
    assert {name: (one.gpus, one.gib) for name, one in times.CLASSES.items()} == CLASSES


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--since", "soon"), "--since: expected"),
        (("--class", "m=9b"), "--class: expected MODEL=CLASS"),
        (("--since", "1h"), "No request for a model"),
    ],
    ids=["since", "class", "none"],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    layout = Layout(tmp_path)
    layout.logs.mkdir(parents=True)
    layout.usage_log.write_text(a_line())
    done = export(tmp_path, *arguments)
    assert done.exit_code in (2, 66)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=20))
def test_arrivals_rise_whatever_the_order_of_the_lines(
    tmp_path_factory: pytest.TempPathFactory, at: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log, out = folder / "usage.jsonl", folder / "trace.csv"
    log.write_text("".join(a_line(time) for time in at))
    assert export(folder / "state", str(log), "--out", str(out)).exit_code == 0
    assert len(list(read_trace(out).arrivals)) == len(at)


@pytest.mark.parametrize("held", ["", "00", "zz", "ab" * 40])
def test_pseudonyms_need_a_whole_key(tmp_path: Path, held: str) -> None:
    layout = Layout(tmp_path / "state")
    layout.logs.mkdir(parents=True)
    layout.usage_log.write_text(a_line())
    layout.pseudonyms.write_text(held)
    done = export(layout.state)
    assert done.exit_code == 2
    assert "expected 64 hexadecimal digits" in done.output
    assert "u-" not in done.output


def test_odd_lines_are_passed_over_and_a_broken_archive_is_named(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    odd = [a_line(**{name: float(said)}) for name in ("time", "bytes_in", "ms") for said in ("nan", "inf")]
    log.write_text("".join(odd) + "[" * 100_000 + "\n" + a_line())
    found = read_log([log])
    assert (len(found.requests), found.unreadable) == (1, len(odd) + 1)
    packed = bytearray(gzip.compress("".join(a_line(time) for time in range(500)).encode()))
    packed[20:60] = b"\xff" * 40
    log.write_bytes(packed)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_log([log])


def test_names_are_kept_once_for_all_lines(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    log.write_text(a_line(1, caller="bob") + a_line(2, caller="bob"))
    first, second = read_log([log]).requests
    assert first.user is second.user
    assert first.model is second.model
    assert not hasattr(first, "__dict__")
