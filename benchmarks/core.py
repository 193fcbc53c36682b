"""What a decision costs: microseconds of CPU for each kind of step and view of the pure core, by the size of the fleet.

    python -m benchmarks.core [--nodes 10 100 1000]

Every node has one engine that fills it (``full``); in the second case 20 further models wait and cannot be placed
(``unplaced``). 500 models in the catalog. Writes ``build/bench/core.json``, exactly ``{CASE: {NODES: {WHAT:
MICROSECONDS}}}``, the best of five rounds without garbage collection, and ``core.png``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gateway_plugin.catalog import Model
from gateway_plugin.phases import BlockPhase
from serve.core import events as ev
from serve.core.effects import OpenRoute
from serve.core.policy import NodeTypeSpec, Policy
from serve.core.state import Fleet
from serve.core.step import initial, step
from serve.core.views.blocks import blocks_view
from serve.core.views.status import model_view, models_view, status_view

OUT = Path(__file__).parents[1] / "build" / "bench"
MODELS, UNPLACED = 500, 20
STEP_US, VIEW_US = 1000.0, 5000.0
"""What a step and a view may take at 1,000 nodes."""
GIB = 1024
NOW = 1010.0
VIEWS = ("one model", "/v1/models", "status", "blocks")

Times = dict[str, dict[int, dict[str, float]]]
"""Case -> nodes -> what -> microseconds."""


def a_fleet(nodes: int, unplaced: int = UNPLACED) -> Fleet:
    """Settled; an engine on every node, of the first 480 models in turn; ``unplaced`` of the others are waited for."""
    serving = MODELS - UNPLACED
    kind = NodeTypeSpec("gpu", 8 * GIB, (80 * GIB, 80 * GIB), 0, nodes)
    fields = {"source": "prepared:x", "gpus": 2, "keep_alive": "1h"}
    models = [Model.model_validate({"name": f"m{i}", "memory_gib": 60, **fields}) for i in range(serving)]
    models += [Model.model_validate({"name": f"w{i}", "memory_gib": 70, **fields}) for i in range(UNPLACED)]
    names = [f"gpu-0-{i}" for i in range(nodes)]
    routed = min(serving, nodes)
    servers = tuple(ev.FoundServer(i, 0, f"h:{i}", True, False, 1, 0.0) for i in range(routed))
    told: list[ev.Event] = [
        ev.CatalogChanged(tuple(models)),
        ev.Started(1, {f"m{i}": i for i in range(routed)}, servers, tuple(names)),
    ]
    for i, node in enumerate(names):
        found = ev.FoundEngine(f"e{i}", f"m{i % serving}", (0, 1), 60 * GIB, 900.0, f"h:{i}", True, 30.0)
        told.append(ev.NodeJoined(node, "gpu", f"block-{node}", "10.0.0.1", 8 * GIB, (80 * GIB, 80 * GIB), (found,)))
    told += [blocks_seen(nodes), ev.Tick(), counters(nodes, 1, 1001.0)]
    told += [ev.Acquire(f"t{i}", f"w{i}", 600.0) for i in range(unplaced)]
    fleet = initial(Policy(node_types=(kind,), slots=600))
    for event in (*told, ev.Tick()):
        fleet, effects = step(fleet, event, 1000.0)
        for effect in effects:
            if isinstance(effect, OpenRoute):
                fleet, _ = step(fleet, ev.RouteOpened(effect.engine), 1000.0)
    assert fleet.settled
    return fleet


def blocks_seen(nodes: int) -> ev.BlocksSeen:
    """The ledger: every node's block runs."""
    return ev.BlocksSeen(
        tuple(
            ev.SeenBlock(f"block-gpu-0-{i}", "gpu", BlockPhase.RUNNING, 800.0, "1", None, "n", 900.0, 100_000.0)
            for i in range(nodes)
        )
    )


def counters(nodes: int, in_flight: int, read_at: float) -> ev.EdgeSeen:
    """The edge's counters, the same of every engine."""
    return ev.EdgeSeen(tuple(ev.ServerSeen(f"e{i}", True, in_flight, 0.0) for i in range(nodes)), read_at)


def work(fleet: Fleet, nodes: int) -> Mapping[str, Callable[[], object]]:
    """What is measured. No step uses the outcome of another."""
    events: dict[str, ev.Event] = {
        "acquire, warm": ev.Acquire("x", "m3", 60.0),
        "acquire, one more waiter": ev.Acquire("x", "w3", 60.0),
        "waiter left": ev.WaiterLeft("t3"),
        "tick": ev.Tick(),
        "engine exited": ev.EngineExited("e3", "gone", True),
        "engine stalled": ev.EngineStalled("e3", 10.0, 1),
        "route refused": ev.RouteRefused("e3", "?"),
        "node joined again": ev.NodeJoined("gpu-0-3", "gpu", "block-gpu-0-3", "10.0.0.1", 8 * GIB, (80 * GIB,) * 2),
        "node gone": ev.NodeGone("gpu-0-3", "?"),
        "counters, all busy": counters(nodes, 5, 1020.0),
        "counters, all idle": counters(nodes, 0, 1020.0),
        "blocks seen": blocks_seen(nodes),
        "catalog changed": ev.CatalogChanged(tuple(fleet.models.values())),
    }
    found: dict[str, Callable[[], object]] = {what: partial(step, fleet, event, NOW) for what, event in events.items()}
    found["one model"] = lambda: model_view(fleet, "w3", NOW)
    found["/v1/models"] = lambda: models_view(fleet, NOW)
    found["status"] = lambda: status_view(fleet, NOW)
    found["blocks"] = lambda: blocks_view(fleet, NOW)
    return found


def microseconds(act: Callable[[], object], rounds: int = 5, least_s: float = 0.03) -> float:
    """CPU time of one call: the best of ``rounds``, each of at least ``least_s``."""
    began = time.process_time()
    act()
    times = max(1, int(least_s / max(1e-6, time.process_time() - began)))
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(times):
            act()
        best = min(best, (time.process_time() - began) / times)
    return best * 1e6


def measure(sizes: Sequence[int]) -> Times:
    """All of it; without the garbage collector, as ``timeit``."""
    found: Times = {}
    gc.disable()
    try:
        for case, unplaced in (("full", 0), ("unplaced", UNPLACED)):
            for nodes in sizes:
                acts = work(a_fleet(nodes, unplaced), nodes)
                times = {what: round(microseconds(act), 1) for what, act in acts.items()}
                found.setdefault(case, {})[nodes] = times
                gc.collect()
    finally:
        gc.enable()
    return found


def draw(times: Times, path: Path) -> None:
    """Time against size, a line for each step and view; dashed: what it may take."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), sharex=True, sharey="row")
    for column, (case, by_size) in enumerate(times.items()):
        sizes = sorted(by_size)
        for row, (views, limit) in enumerate(((False, STEP_US), (True, VIEW_US))):
            axis = axes[row][column]
            for what in next(iter(by_size.values())):
                if (what in VIEWS) is views:
                    axis.plot(sizes, [by_size[size][what] for size in sizes], marker="o", ms=3, label=what)
            axis.axhline(limit, color="#a33", ls="--", lw=1)
            axis.set(
                xscale="log", yscale="log", title=f"{'views' if views else 'steps'}, {case}", ylabel="microseconds"
            )
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7, ncols=2)
    for axis in axes[1]:
        axis.set_xlabel("nodes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(times: Times, console: Console) -> None:
    """The table."""
    table = Table("", *(f"{case}, {size} nodes" for case, by_size in times.items() for size in by_size))
    for what in next(iter(next(iter(times.values())).values())):
        limit = VIEW_US if what in VIEWS else STEP_US
        cells = [by_size[size][what] for by_size in times.values() for size in by_size]
        table.add_row(what, *(f"{'[red]' if cell > limit else ''}{cell:,.0f} us" for cell in cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000], help="sizes of the fleet")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for core.json and core.png")
    chosen = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    times = measure(chosen.nodes)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "core.json").write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")
    draw(times, chosen.out / "core.png")
    show(times, console)
    console.print(f"{chosen.out / 'core.json'}, core.png")


if __name__ == "__main__":
    main()
