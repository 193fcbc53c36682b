"""Growth rules compared: the same day of bursty demand, the same queue, the same controller but for one function.

What each rule pays (hours of nodes that ran) and what it buys (requests that wait over a minute):

    python -m benchmarks.growth [--seed 1]

writes ``build/bench/growth.json``, exactly ``{RULE: {"node_hours", "waited_over_60s", "jobs_submitted",
"max_over_submission"}}``, and ``growth.png``. The same seed gives the same file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.growth_rules import OneAMinute, ParslSimple, RayDefault, UpOnly
from benchmarks.growth_trace import DAY_S, NODE, Queue, Request, day
from benchmarks.growth_world import Rule, Tally, World
from serve.core.fleet import Policy

OUT = Path(__file__).parents[1] / "build" / "bench"

RULES: Mapping[str, Callable[[], Rule | None]] = {
    "gateway": lambda: None,
    "parsl-simple": ParslSimple,
    "one-a-minute": OneAMinute,
    "up-only": UpOnly,
    "ray-default": RayDefault,
}
"""A fresh rule for each run; ``None``: the project's own."""


def simulate(name: str, trace: tuple[Request, ...], seed: int, end_s: float = DAY_S) -> Tally:
    """One rule's day."""
    return World(trace, Queue(seed), Policy(kinds=(NODE,), waiting_max=100_000), RULES[name](), end_s).run()


def show(tallies: Mapping[str, Tally], console: Console) -> None:
    """The table."""
    made = Table(title="A day of bursty demand", title_justify="left")
    columns = (
        "rule",
        "node hours",
        "waited > 60 s",
        "jobs submitted",
        "largest over-submission",
        "refused",
        "requests",
    )
    for column in columns:
        made.add_column(column, justify="left" if column == "rule" else "right")
    for name, tally in tallies.items():
        made.add_row(
            name,
            f"{tally.node_hours:.1f}",
            f"{100 * tally.waited_over_60s:.2f} %",
            str(len(tally.jobs)),
            str(tally.over_submission),
            str(len(tally.refused_s)),
            str(tally.requests),
        )
    console.print(made)


def draw(tallies: Mapping[str, Tally], path: Path) -> None:
    """Nodes over the day for each rule, and what was paid against who waited."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = len(tallies)
    figure, axes = pyplot.subplots(rows + 1, 1, figsize=(10, 2 * rows + 4), height_ratios=[*([1] * rows), 2.2])
    for axis, (name, tally) in zip(axes, tallies.items(), strict=False):
        hours = [0.0, *(at / 3600 for at, _, _ in tally.nodes_over_time), tally.end_s / 3600]
        running = [0, *(up for _, up, _ in tally.nodes_over_time)]
        both = [0, *(up + pending for _, up, pending in tally.nodes_over_time)]
        axis.stairs(both, hours, fill=True, color="#f2c879", label="pending")
        axis.stairs(running, hours, fill=True, color="#3b6ea5", label="running")
        axis.set(ylabel=name, xlim=(0, tally.end_s / 3600), ylim=(0, NODE.max_nodes + 0.5))
        axis.set_title(f"{tally.node_hours:.0f} node hours", fontsize=9, loc="right", pad=2)
    axes[0].legend(loc="upper left", fontsize=8, ncols=2)
    axes[rows - 1].set_xlabel("hour of the day")
    last = axes[rows]
    for name, tally in tallies.items():
        last.scatter(tally.node_hours, 100 * tally.waited_over_60s, s=60, label=name, zorder=3)
        last.annotate(
            f" {name}", (tally.node_hours, 100 * tally.waited_over_60s), xytext=(4, 4), textcoords="offset points"
        )
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
    parser.add_argument("--seed", type=int, default=1, help="of the day's demand and of the queue")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for growth.json and growth.png")
    chosen = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    began = time.monotonic()
    trace = day(chosen.seed)
    tallies: dict[str, Tally] = {}
    for name in RULES:
        with console.status(f"simulating {name}"):
            tallies[name] = simulate(name, trace, chosen.seed)
    chosen.out.mkdir(parents=True, exist_ok=True)
    document = {name: tally.document() for name, tally in tallies.items()}
    (chosen.out / "growth.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(tallies, chosen.out / "growth.png")
    show(tallies, console)
    console.print(f"{chosen.out / 'growth.json'}, growth.png; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
