"""``python -m serve.simulate`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from serve.simulate.__main__ import main
from serve.simulate.report import document

KEYS = {
    "switches", "wait_mean_s", "wait_p50_s", "wait_p95_s", "wait_p99_s", "wait_max_s", "device_s_lost", "gpu_hours",
    "jain",
}  # fmt: skip
TWO = ("--trace", "llmux-dominant", "--policy", "fifo", "--policy", "llmux", "--jobs", "1")


def test_the_json_has_a_cell_for_each_trace_and_policy() -> None:
    ran = CliRunner().invoke(main, [*TWO, "--trace", "llmux-interleave", "--json"])

    assert ran.exit_code == 0
    cells = json.loads(ran.stdout)
    assert list(cells) == ["llmux-dominant", "llmux-interleave"]
    assert all(list(cells[trace]) == ["fifo", "llmux"] for trace in cells)
    assert all(set(cell) == KEYS for policies in cells.values() for cell in policies.values())


def test_the_table_goes_to_stdout_and_progress_to_stderr() -> None:
    ran = CliRunner().invoke(main, TWO)

    assert ran.exit_code == 0
    assert "llmux-dominant: 50 requests, 1 GPUs" in ran.stdout
    assert "llmux-dominant, fifo, seed 1" in ran.stderr


@pytest.mark.process  # matplotlib asks fontconfig for fonts, once on a machine
def test_pictures_and_json_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, [*TWO, "--gantt", "fifo", "--out", str(tmp_path / "out")])

    assert ran.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "devices-llmux-dominant-fifo.png", "switching.json", "targets.json", "waits-llmux-dominant.png",
    ]  # fmt: skip
    for picture in (tmp_path / "out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "nothing-of-the-kind"], "trace 'nothing-of-the-kind': neither a file nor one of abab-closed"),
        (["--trace", "zipf-50", "--gpus", "2"], "model '70b-04' needs 4 GPUs with 40 GiB each; a node has 2 with 76"),
        (["--trace", "BAD"], "bad.csv, line 3: unknown model 'gpt-x'; expected a name of a class: 32b, 70b, 8b, moe"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(tmp_path: Path, arguments: list[str], said: str) -> None:
    bad = tmp_path / "bad.csv"
    header = "arrival_s,model,prompt_tokens,output_tokens,user"
    bad.write_text(f"{header}\n0,8b-1,1,1,u\n1,gpt-x,1,1,u\n", encoding="utf-8")

    ran = CliRunner().invoke(main, [str(bad) if word == "BAD" else word for word in arguments])

    assert ran.exit_code == 2
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_of_several_seeds_the_median_is_shown() -> None:
    ran = CliRunner().invoke(main, [*TWO, "--seed", "1", "--seed", "2", "--seed", "3", "--json"])

    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["llmux-dominant"]["fifo"]["switches"] == 1
    assert document({}) == {}


def test_host_memory_adds_a_cell_of_those_that_sleep_alone() -> None:
    ran = CliRunner().invoke(main, [*TWO, "--policy", "gateway", "--host-gib", "0", "--host-gib", "256", "--json"])

    assert {trace: list(cells) for trace, cells in json.loads(ran.stdout).items()} == {
        "llmux-dominant": ["fifo", "llmux", "gateway"],
        "llmux-dominant+256GiB": ["gateway"],
    }


def test_the_fewest_gpus_are_printed_and_written(tmp_path: Path) -> None:
    day = tmp_path / "day.csv"
    lines = "".join(f"{second},8b-1,10,10,u\n" for second in range(8000))  # the first load makes 47 wait
    day.write_text(f"arrival_s,model,prompt_tokens,output_tokens,user\n{lines}", encoding="utf-8")
    arguments = ["--trace", str(day), "--gpus-needed", "--policy", "lru", "--jobs", "1", "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(main, arguments)

    assert ran.exit_code == 0
    assert [word for word in ran.stdout.splitlines()[-2].split() if word.isalnum()] == ["day", "lru", "0", "4", "4"]
    written = json.loads((tmp_path / "out" / "gpus-needed.json").read_text(encoding="utf-8"))
    assert [(one["trace"], one["policy"], one["gpus"]) for one in written] == [("day", "lru", {"60": 4, "10": 4})]
