"""Policies of switching compared in virtual time: the same arrivals, the same devices, the same times.

``gateway`` is the controller's own code (serve.core); the others are baselines, each with its source in
serve/simulate/baselines.py. Times by class of model are in serve/simulate/times.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway_plugin.errors import GatewayError
from serve.simulate.baselines import POLICIES
from serve.simulate.generators import SHAPES
from serve.simulate.report import document, draw_devices, draw_waits, show
from serve.simulate.runs import Cell, Outcomes, fleet_for, load, run
from serve.simulate.world import PATIENCE_S

_POLICY = click.Choice(list(POLICIES))
_COUNT = click.IntRange(1, 4096)
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
@click.option("--json", "as_json", is_flag=True, help="Print the JSON instead of the table.")
def main(
    traces: tuple[str, ...],
    policies: tuple[str, ...],
    gpus: tuple[int, ...],
    gpus_per_node: int,
    gpu_gib: float,
    seeds: tuple[int, ...],
    variations: tuple[int, ...],
    patience_s: float,
    jobs: int | None,
    out: Path | None,
    pictured: str,
    as_json: bool,
) -> None:
    """See ``help``."""
    cells = [
        Cell(
            trace, policy, seed, size, gpus_per_node, gpu_gib, _label(trace, variation, size, gpus), patience_s,
            keep_spans=out is not None and policy == pictured and seed == (seeds or (1,))[0], resample=variation,
        )
        for trace in traces or tuple(SHAPES)
        for variation in variations or (None,)
        for size in gpus or (None,)
        for policy in policies or tuple(POLICIES)
        for seed in (seeds or (1,) if trace in SHAPES else (1,))
    ]  # fmt: skip
    try:
        for cell in {(cell.trace, cell.gpus, cell.resample): cell for cell in cells}.values():
            fleet_for(load(cell.trace, 1, cell.resample), cell)
        results = _grouped(cells, list(_run_all(cells, jobs or os.cpu_count() or 1)))
    except GatewayError as error:
        print(f"serve.simulate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    made = document(results)
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        console = Console()
        show(results, console if console.is_terminal else Console(width=140))
    if out is not None:
        _write(out, made, results)


def _label(trace: str, variation: int | None, size: int | None, sizes: tuple[int, ...]) -> str:
    name = Path(trace).name.removesuffix(".gz").removesuffix(".csv") + ("" if variation is None else f"~{variation}")
    return f"{name}@{size}" if len(sizes) > 1 else name


def _run_all(cells: list[Cell], jobs: int) -> Iterator[Outcomes]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("simulating", total=len(cells))
        for cell, found in _each(cells, jobs):
            progress.advance(task)
            if not console.is_terminal:
                took = "not possible for this trace" if found is None else f"{found.took_s:.1f} s"
                console.print(f"{cell.label}, {cell.policy}, seed {cell.seed}: {took}", highlight=False)
            if found is not None:
                yield found


def _each(cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, Outcomes | None]]:
    """In the order in which they end; one at a time: here, in their own order."""
    if jobs == 1:
        yield from ((cell, run(cell)) for cell in cells)
        return
    with ProcessPoolExecutor(min(jobs, len(cells))) as workers:
        running: dict[Future[Outcomes | None], Cell] = {workers.submit(run, cell): cell for cell in cells}
        yield from ((running[done], done.result()) for done in as_completed(running))


def _grouped(cells: Iterable[Cell], found: Iterable[Outcomes]) -> dict[str, dict[str, list[Outcomes]]]:
    """In the order of the cells, however they ended."""
    order = {(cell.label, cell.policy, cell.seed): index for index, cell in enumerate(cells)}
    results: dict[str, dict[str, list[Outcomes]]] = {}
    for one in sorted(found, key=lambda one: order[one.cell.label, one.cell.policy, one.cell.seed]):
        results.setdefault(one.cell.label, {}).setdefault(one.cell.policy, []).append(one)
    return results


def _write(out: Path, made: object, results: dict[str, dict[str, list[Outcomes]]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "switching.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    for trace, by_policy in results.items():
        draw_waits(trace, by_policy, out / f"waits-{trace}.png")
        for ran in by_policy.values():
            for one in ran:
                if one.spans:
                    draw_devices(one, out / f"devices-{trace}-{one.cell.policy}.png")
    print(f"{out}/switching.json, waits-*.png, devices-*.png", file=sys.stderr)


if __name__ == "__main__":
    main()
