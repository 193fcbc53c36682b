"""Growth rules compared: the same days of bursty demand, the same queue, the same controller but for one function.

What each rule pays (hours of nodes that ran) and what it buys (requests that wait over a minute):

    python -m benchmarks.growth [--seeds 201 202 203]

writes ``build/bench/growth.json``, exactly ``{RULE: {"node_hours", "waited_over_60s", "jobs_submitted",
"max_over_submission"}}``: medians over the days, of the last one the largest; and ``growth.png``. The same seeds give
the same file. Our numbers (``serve.core.policy.Policy``) were chosen on ``TUNED_ON``; the days shown are others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.growth_day import Day, Rule, run_day
from benchmarks.growth_rules import OneAMinute, ParslSimple, RayDefault, UpOnly
from benchmarks.growth_trace import DAY_S, NODE, Queue, day
from serve.simulate.traces import Request

TUNED_ON = range(100, 110)
HELD_OUT = range(201, 210)
"""Days that no number was chosen on."""

OUT = Path(__file__).parents[1] / "build" / "bench"

RULES: Mapping[str, Callable[[], Rule | None]] = {
    "gateway": lambda: None,
    "parsl-simple": ParslSimple,
    "one-a-minute": OneAMinute,
    "up-only": UpOnly,
    "ray-default": RayDefault,
}
"""A fresh rule for each run; ``None``: the project's own."""


def simulate(name: str, trace: tuple[Request, ...], seed: int, end_s: float = DAY_S) -> Day:
    """One rule's day."""
    return run_day(trace, Queue(seed), RULES[name](), end_s)


def compare(seeds: Sequence[int]) -> dict[str, list[Day]]:
    """Every rule's days, in the order of ``seeds``, on as many cores as there are."""
    with ProcessPoolExecutor() as workers:
        runs = {name: [workers.submit(_one, name, seed) for seed in seeds] for name in RULES}
        return {name: [run.result() for run in days] for name, days in runs.items()}


def _one(name: str, seed: int) -> Day:
    return simulate(name, day(seed), seed)


def summary(days: Sequence[Day]) -> dict[str, float | int]:
    """One rule's line in ``growth.json``."""
    found = [one.document() for one in days]
    middle = {key: median(document[key] for document in found) for key in found[0]}
    return {**middle, "max_over_submission": max(one.over_submission for one in days)}


def no_worse(ours: Iterable[Day], others: Iterable[Day]) -> tuple[int, int]:
    """On how many days ours paid no more, and let no more wait."""
    pairs = list(zip(ours, others, strict=True))
    return (
        sum(our.node_hours <= other.node_hours for our, other in pairs),
        sum(our.waited_over_60s <= other.waited_over_60s for our, other in pairs),
    )


def show(days_of: Mapping[str, Sequence[Day]], console: Console) -> None:
    """The table."""
    days = len(days_of["gateway"])
    made = Table(title=f"{days} days of bursty demand: medians", title_justify="left")
    columns = (
        "rule",
        "node hours",
        "waited > 60 s",
        "jobs submitted",
        "largest over-submission",
        "refused",
        "days with no more hours / waits than",
    )
    for column in columns:
        made.add_column(column, justify="left" if column == "rule" else "right")
    for name, ran in days_of.items():
        line = summary(ran)
        hours, waits = no_worse(days_of["gateway"], ran)
        made.add_row(
            name,
            f"{line['node_hours']:.1f}",
            f"{100 * line['waited_over_60s']:.2f} %",
            f"{line['jobs_submitted']:.0f}",
            str(line["max_over_submission"]),
            f"{median(one.refused for one in ran):.0f}",
            "" if name == "gateway" else f"{hours} / {waits} of {days}",
        )
    console.print(made)


def draw(days_of: Mapping[str, Sequence[Day]], path: Path) -> None:
    """Nodes over the first day for each rule; and what was paid against who waited, every day and their medians."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = len(days_of)
    figure, axes = pyplot.subplots(rows + 1, 1, figsize=(10, 2 * rows + 4), height_ratios=[*([1] * rows), 2.2])
    for axis, (name, (one, *_)) in zip(axes, days_of.items(), strict=False):
        hours = [0.0, *(at / 3600 for at, _, _ in one.nodes_over_time), one.end_s / 3600]
        running = [0, *(up for _, up, _ in one.nodes_over_time)]
        both = [0, *(up + pending for _, up, pending in one.nodes_over_time)]
        axis.stairs(both, hours, fill=True, color="#f2c879", label="pending")
        axis.stairs(running, hours, fill=True, color="#3b6ea5", label="running")
        axis.set(ylabel=name, xlim=(0, one.end_s / 3600), ylim=(0, NODE.max_nodes + 0.5))
        axis.set_title(f"{one.node_hours:.0f} node hours", fontsize=9, loc="right", pad=2)
    axes[0].legend(loc="upper left", fontsize=8, ncols=2)
    axes[rows - 1].set_xlabel("hour of the day")
    last = axes[rows]
    for name, ran in days_of.items():
        line = summary(ran)
        middle = (line["node_hours"], 100 * line["waited_over_60s"])
        dots = last.scatter(*middle, s=70, zorder=3)
        every = [(one.node_hours, 100 * one.waited_over_60s) for one in ran]
        last.scatter(*zip(*every, strict=True), s=12, alpha=0.4, color=dots.get_facecolor(), zorder=2)
        last.annotate(f" {name}", middle, xytext=(4, 4), textcoords="offset points", zorder=4)
    last.set(xlabel="node hours paid", ylabel="requests that waited > 60 s, %")
    last.margins(0.15)
    last.set_xlim(left=0)
    last.set_ylim(bottom=0)
    last.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said = "one for each day: of its demand and of its queue"
    parser.add_argument("--seeds", type=int, nargs="+", default=list(HELD_OUT), help=said)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for growth.json and growth.png")
    chosen = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    began = time.monotonic()
    with console.status(f"simulating {len(chosen.seeds)} days under {len(RULES)} rules"):
        days_of = compare(chosen.seeds)
    chosen.out.mkdir(parents=True, exist_ok=True)
    document = {name: summary(ran) for name, ran in days_of.items()}
    (chosen.out / "growth.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(days_of, chosen.out / "growth.png")
    show(days_of, console)
    console.print(f"{chosen.out / 'growth.json'}, growth.png; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
