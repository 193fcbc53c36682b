"""How one policy does against the others over several traces, and against the project's targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.simulate.generators import SHAPES
from serve.simulate.report import Results
from serve.simulate.runs import Cell, Outcomes

OURS = "gateway"
LLMUX_BEST = (28, 6.3)
"""Switches and mean wait of the best policy in llmux's report, over its four profiles."""
WARM_GIB = 1024.0
RATIOS: Mapping[str, tuple[str, str]] = {
    "p95 / fifo": ("wait_p95_s", "fifo"),
    "p95 / lru": ("wait_p95_s", "lru"),
    "mean / lru": ("wait_mean_s", "lru"),
    "GPU-s lost / clairvoyant": ("device_s_lost", "clairvoyant"),
    "mean / clairvoyant": ("wait_mean_s", "clairvoyant"),
}
"""Column -> the figure, and the policy whose figure divides it."""


@dataclass(frozen=True)
class Target:
    """One target and what was found."""

    trace: str
    what: str
    limit: float
    found: float
    met: bool


def ratios(results: Results, ours: str = OURS) -> dict[str, dict[str, float]]:
    """Trace -> column -> our figure divided by theirs; where both are zero: 1."""
    found: dict[str, dict[str, float]] = {}
    for trace, by_policy in results.items():
        if ours in by_policy:
            row = {
                column: _ratio(_figure(by_policy[ours], figure), _figure(by_policy[other], figure))
                for column, (figure, other) in RATIOS.items()
                if other in by_policy and other != ours
            }
            if row:
                found[trace] = row
    return found


def targets(results: Results, ours: str = OURS) -> list[Target]:
    """Those for which ``results`` has the cells."""
    found = [target for trace in results for target in _of_a_file(trace, results[trace], ours)]
    made = {trace: by for trace, by in results.items() if _is(by, lambda cell: _generated(cell) and not _llmux(cell))}
    for column, limit in (("p95 / fifo", 0.5), ("p95 / lru", 0.7)):
        there = [row[column] for row in ratios(made, ours).values() if column in row]
        if there:
            found.append(_at_most(f"{len(there)} generated", f"median of {column}", limit, median(there)))
    if ours in results.get("greedy-100", {}):
        jain = _figure(results["greedy-100"][ours], "jain")
        found.append(Target("greedy-100", "Jain's index over users at least", 0.95, jain, jain >= 0.95))
    mine = {trace: by[ours] for trace, by in results.items() if ours in by}
    if mine:
        late = {trace: max(one.past_bound for one in ran) for trace, ran in mine.items()}
        worst = max(late, key=lambda trace: late[trace])
        found.append(
            _at_most("all" if not late[worst] else worst, "requests that waited past the bound", 0, late[worst])
        )
    llmux = [ran for ran in mine.values() if _llmux(ran[0].cell)]
    if len(llmux) == 4:
        switches = sum(_figure(ran, "switches") for ran in llmux)
        waited = sum(_figure(ran, "wait_mean_s") * ran[0].requests for ran in llmux) / sum(r[0].requests for r in llmux)
        best, best_s = LLMUX_BEST
        found.append(Target("llmux's four", "switches, fewer than", best, switches, switches < best))
        found.append(Target("llmux's four", "mean wait in seconds, less than", best_s, waited, waited < best_s))
    return found


def _of_a_file(trace: str, by_policy: Mapping[str, Sequence[Outcomes]], ours: str) -> Iterator[Target]:
    if ours not in by_policy or not _is(by_policy, lambda cell: not _generated(cell)):
        return
    ran = by_policy[ours]
    if ran[0].cell.host_gib > 0:
        yield _at_most(trace, "mean wait in seconds", 1.5, _figure(ran, "wait_mean_s"))
        if ran[0].cell.host_gib >= WARM_GIB:
            yield _at_most(trace, "p99 of the waits in seconds", 20, _figure(ran, "wait_p99_s"))
        return
    for other in ("lru", "fifo"):
        if other in by_policy:
            theirs = by_policy[other]
            yield _at_most(trace, f"waits over 10 s / {other}", 0.45, _ratio(_over_10_s(ran), _over_10_s(theirs)))
            for figure, limit in (("wait_mean_s", 0.65), ("wait_p99_s", 1.0)):
                said = figure.removeprefix("wait_").removesuffix("_s")
                yield _at_most(trace, f"{said} / {other}", limit, _ratio(_figure(ran, figure), _figure(theirs, figure)))
    if "clairvoyant" in by_policy:
        theirs = by_policy["clairvoyant"]
        for figure, said, limit in (("device_s_lost", "GPU-s lost", 1.25), ("wait_mean_s", "mean", 1.0)):
            found = _ratio(_figure(ran, figure), _figure(theirs, figure))
            yield _at_most(trace, f"{said} / clairvoyant", limit, found)


def _at_most(trace: str, what: str, limit: float, found: float) -> Target:
    return Target(trace, f"{what} at most", limit, found, found <= limit)


def _is(by_policy: Mapping[str, Sequence[Outcomes]], kind: Callable[[Cell], bool]) -> bool:
    return all(kind(ran[0].cell) for ran in by_policy.values())


def _generated(cell: Cell) -> bool:
    return cell.trace in SHAPES


def _llmux(cell: Cell) -> bool:
    return cell.trace.startswith("llmux-")


def _figure(ran: Sequence[Outcomes], figure: str) -> float:
    return median(one.figures[figure] for one in ran)


def _over_10_s(ran: Sequence[Outcomes]) -> float:
    return median(one.over_10_s for one in ran)


def _ratio(mine: float, theirs: float) -> float:
    if theirs:
        return mine / theirs
    return math.inf if mine else 1.0


def show_targets(results: Results, console: Console) -> None:
    """Two tables: ratios for each trace with their medians over all, and targets. Nothing where there are none."""
    rows = ratios(results)
    if rows:
        made = Table(title=f"{OURS} / others, by trace", title_justify="left")
        made.add_column("trace", no_wrap=True)
        for column in RATIOS:
            made.add_column(column, justify="right", no_wrap=True)
        for trace, row in rows.items():
            made.add_row(trace, *(f"{row[column]:.2f}" if column in row else "" for column in RATIOS))
        there = {column: [row[column] for row in rows.values() if column in row] for column in RATIOS}
        medians = (f"{median(found):.2f}" if found else "" for found in there.values())
        made.add_row(f"median of {len(rows)}", *medians, style="bold")
        console.print(made)
    found = targets(results)
    if found:
        made = Table(title="Targets", title_justify="left")
        for column in ("trace", "target", "limit", "found", ""):
            made.add_column(column, justify="right" if column in ("limit", "found") else "left", no_wrap=True)
        for one in found:
            made.add_row(one.trace, one.what, f"{one.limit:g}", f"{one.found:.3g}", "met" if one.met else "missed")
        console.print(made)


def targets_document(results: Results) -> dict[str, Any]:
    """For the file; JSON has no infinity."""
    rows = {
        trace: {column: round(each, 4) if math.isfinite(each) else None for column, each in row.items()}
        for trace, row in ratios(results).items()
    }
    told = [asdict(one) | {"found": one.found if math.isfinite(one.found) else None} for one in targets(results)]
    return {"ratios": rows, "targets": told}
