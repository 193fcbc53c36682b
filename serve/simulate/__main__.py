"""Policies of switching compared in virtual time: the same arrivals, the same devices, the same times.

``gateway`` is the controller's own code (serve.core); the others are baselines, each with its source in
serve/simulate/baselines.py. Times by class of model are in serve/simulate/times.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway_plugin.errors import GatewayError
from serve.simulate.baselines import POLICIES
from serve.simulate.generators import SHAPES
from serve.simulate.needed import needed, needed_document, show_needed
from serve.simulate.report import document, draw_devices, draw_waits, show
from serve.simulate.runs import Cell, Outcomes, fleet_for, load, run
from serve.simulate.targets import show_targets, targets_document
from serve.simulate.times import PIN_GIB_PER_S
from serve.simulate.workers import each
from serve.simulate.world import PATIENCE_S

_POLICY = click.Choice(list(POLICIES))
_COUNT = click.IntRange(1, 4096)
SLEEPING = ("gateway",)
"""Policies that let engines sleep."""
Found = TypeVar("Found")
_AMOUNT = click.FloatRange(0, 1e9, min_open=True)


@click.command(
    help=f"""{__doc__}

\b
Traces made from a seed:
  {", ".join(list(SHAPES)[:5])},
  {", ".join(list(SHAPES)[5:9])},
  {", ".join(list(SHAPES)[9:])}
\b
A file has the columns arrival_s,model,prompt_tokens,output_tokens,user in order
of time, gzip or plain; a model's class is the first part of its name:
8b, 32b, 70b, vl or moe.
\b
Policies (default: all):
  {", ".join(list(POLICIES)[:6])},
  {", ".join(list(POLICIES)[6:])}
\b
Examples:
  python -m serve.simulate --trace abab-open --policy gateway --policy fifo
  python -m serve.simulate --trace day.csv.gz --gpus 16 --gpus 24
  python -m serve.simulate --trace day.csv.gz --resample 1 --resample 2
"""
)
@click.option("--trace", "traces", multiple=True, metavar="NAME|FILE", help="Several may be given. Default: all made.")
@click.option("--policy", "policies", multiple=True, type=_POLICY, metavar="NAME", help="Several may be given.")
@click.option("--gpus", multiple=True, type=_COUNT, metavar="N", help="Size of the fleet. Several: each. "
              "Default: the trace's own; 16 for files.")  # fmt: skip
@click.option("--gpus-per-node", default=8, show_default=True, type=_COUNT, metavar="N", help="Used with --gpus.")
@click.option("--gpu-gib", default=76.0, show_default=True, type=_AMOUNT, metavar="GIB", help="Used with --gpus.")
@click.option("--host-gib", "hosts_gib", multiple=True, type=click.FloatRange(0, 1e6), metavar="GIB",
              help="Of each node, for engines that sleep (no baseline's do). Several: each. Default: 0.")  # fmt: skip
@click.option("--pin-gib-per-s", default=PIN_GIB_PER_S, show_default=True, type=_AMOUNT, metavar="GIB",
              help="How fast an engine's first sleep takes host memory.")  # fmt: skip
@click.option("--seed", "seeds", multiple=True, type=int, metavar="N", help="Several: medians are shown. Default: 1.")
@click.option("--resample", "variations", multiple=True, type=int, metavar="SEED", help="Instead of each trace, a "
              "day like it: other times, other busy models. Several may be given.")  # fmt: skip
@click.option("--patience-s", default=PATIENCE_S, show_default=True, type=_AMOUNT, metavar="SECONDS",
              help="A request that waits longer is refused.")  # fmt: skip
@click.option("--jobs", type=_COUNT, metavar="N", help="Processes at a time. Default: one per core.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Write switching.json and the pictures there.")  # fmt: skip
@click.option("--gantt", "pictured", default="gateway", show_default=True, type=_POLICY, metavar="NAME",
              help="Used with --out: the policy whose devices are drawn.")  # fmt: skip
@click.option("--gpus-needed", "fewest", is_flag=True, help="Instead of all this: the fewest GPUs at which 99 % of the "
              "requests start within 10 s, and within 60 s. Default policies: gateway, lru, static.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the JSON instead of the tables.")
def main(
    traces: tuple[str, ...],
    policies: tuple[str, ...],
    gpus: tuple[int, ...],
    gpus_per_node: int,
    gpu_gib: float,
    hosts_gib: tuple[float, ...],
    pin_gib_per_s: float,
    seeds: tuple[int, ...],
    variations: tuple[int, ...],
    patience_s: float,
    jobs: int | None,
    out: Path | None,
    pictured: str,
    fewest: bool,
    as_json: bool,
) -> None:
    """See ``help``."""
    cells = [
        Cell(
            trace, policy, seed, size, gpus_per_node, gpu_gib, _label(trace, variation, size, gpus, host),
            patience_s, keep_spans=out is not None and policy == pictured and seed == (seeds or (1,))[0],
            host_gib=host, pin_gib_per_s=pin_gib_per_s, resample=variation,
        )
        for trace in traces or tuple(SHAPES)
        for variation in variations or (None,)
        for size in gpus or (None,)
        for host in hosts_gib or (0.0,)
        for policy in policies or (("gateway", "lru", "static") if fewest else tuple(POLICIES))
        for seed in (seeds or (1,) if trace in SHAPES else (1,))
        if not host or policy in SLEEPING
    ]  # fmt: skip
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    jobs = jobs or os.cpu_count() or 1
    try:
        if fewest:
            _needed(cells, jobs, out, None if as_json else console)
        else:
            _compared(cells, jobs, out, None if as_json else console)
    except GatewayError as error:
        print(f"serve.simulate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _compared(cells: Sequence[Cell], jobs: int, out: Path | None, console: Console | None) -> None:
    """``console`` is ``None``: print the JSON."""
    for cell in {(cell.trace, cell.gpus, cell.resample): cell for cell in cells}.values():
        fleet_for(load(cell.trace, 1, cell.resample), cell)
    results = _grouped(cells, [found for found in _all(run, cells, jobs) if found is not None])
    made = document(results)
    if console is None:
        print(json.dumps(made, indent=2))
    else:
        show(results, console)
        show_targets(results, console)
    if out is not None:
        _write(out, made, results)


def _needed(cells: Sequence[Cell], jobs: int, out: Path | None, console: Console | None) -> None:
    """Once for each trace, policy and size of host memory."""
    asked = {(cell.trace, cell.resample, cell.policy, cell.host_gib): cell for cell in cells}
    answers = list(_all(needed, list(asked.values()), jobs))
    answers.sort(key=lambda one: (one.cell.label, one.cell.policy, one.cell.host_gib))
    made = needed_document(answers)
    if console is None:
        print(json.dumps(made, indent=2))
    else:
        show_needed(answers, console)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpus-needed.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _label(trace: str, variation: int | None, size: int | None, sizes: Sequence[int], host: float) -> str:
    name = Path(trace).name.removesuffix(".gz").removesuffix(".csv") + ("" if variation is None else f"~{variation}")
    return name + (f"@{size}" if len(sizes) > 1 else "") + (f"+{host:g}GiB" if host else "")


def _all(work: Callable[[Cell], Found], cells: Sequence[Cell], jobs: int) -> Iterator[Found]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("simulating", total=len(cells))
        for cell, found in each(work, cells, jobs):
            progress.advance(task)
            if not console.is_terminal:
                took = f"{found.took_s:.1f} s" if isinstance(found, Outcomes) else "done" if found else "not possible"
                console.print(f"{cell.label}, {cell.policy}, seed {cell.seed}: {took}", highlight=False)
            yield found


def _grouped(cells: Iterable[Cell], found: Iterable[Outcomes]) -> dict[str, dict[str, list[Outcomes]]]:
    """In the order of the cells, however they ended."""
    order = {(cell.label, cell.policy, cell.seed): index for index, cell in enumerate(cells)}
    results: dict[str, dict[str, list[Outcomes]]] = {}
    for one in sorted(found, key=lambda one: order[one.cell.label, one.cell.policy, one.cell.seed]):
        results.setdefault(one.cell.label, {}).setdefault(one.cell.policy, []).append(one)
    return results


def _write(out: Path, made: object, results: dict[str, dict[str, list[Outcomes]]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, what in (("switching", made), ("targets", targets_document(results))):
        (out / f"{name}.json").write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")
    for trace, by_policy in results.items():
        draw_waits(trace, by_policy, out / f"waits-{trace}.png")
        for ran in by_policy.values():
            for one in ran:
                if one.spans:
                    draw_devices(one, out / f"devices-{trace}-{one.cell.policy}.png")
    print(f"{out}/switching.json, targets.json, waits-*.png, devices-*.png", file=sys.stderr)


if __name__ == "__main__":
    main()
