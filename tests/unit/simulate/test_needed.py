"""The fewest GPUs: worked out by hand for the static policy, and found by trying."""

from __future__ import annotations

from pathlib import Path

from serve.simulate.needed import needed
from serve.simulate.runs import Cell


def day(folder: Path, *lines: tuple[float, str]) -> str:
    path = folder / "day.csv"
    rows = "".join(f"{at},{model},10,10,u\n" for at, model in sorted(lines))
    path.write_text("arrival_s,model,prompt_tokens,output_tokens,user\n" + rows, encoding="utf-8")
    return str(path)


def test_static_gives_gpus_to_all_but_the_one_percent(tmp_path: Path) -> None:
    hot = [(float(at), "8b-hot") for at in range(985)]
    tail = [(0.5, "70b-a")] * 5 + [(1.5, "70b-b")] * 4 + [(2.5, "32b-c")] * 6
    trace = day(tmp_path, *hot, *tail)  # of 1,000 ten may wait: a and b, which have the most GPUs

    assert needed(Cell(trace, "static")).gpus == {60.0: 4, 10.0: 4}


def test_as_many_as_keep_what_is_asked_in_turn_are_found_by_trying(tmp_path: Path) -> None:
    turns = [
        (1.0 + 5 * turn, f"32b-{turn % 6}") for turn in range(2000)
    ]  # six models in turn: each has its GPU or waits
    found = needed(Cell(day(tmp_path, *turns), "lru"))

    assert found.gpus == {60.0: 8, 10.0: 8}
    assert set(found.tried) == {4, 8}
    assert found.tried[4][60.0] < 0.99 <= found.tried[8][10.0]


def test_a_trace_of_first_requests_has_no_answer(tmp_path: Path) -> None:
    found = needed(Cell(day(tmp_path, (0.0, "32b-a"), (1.0, "32b-b")), "lru"))

    assert found.gpus == {60.0: None, 10.0: None}


def test_where_every_load_takes_less_than_the_limit_fewer_gpus_do(tmp_path: Path) -> None:
    turns = [
        (15.0 * turn, f"8b-{turn % 13:02}") for turn in range(1400)
    ]  # four GPUs have room for twelve, which load 45 s
    found = needed(Cell(day(tmp_path, *turns), "lru"))

    assert found.gpus == {60.0: 4, 10.0: 8}
