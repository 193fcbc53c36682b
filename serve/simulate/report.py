"""Reports of the runs: a table, the JSON, and two kinds of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.simulate.metrics import Span
from serve.simulate.runs import Outcomes

Results = Mapping[str, Mapping[str, Sequence[Outcomes]]]
"""Trace -> policy -> its runs, one for each seed."""

_COLUMNS = (
    "policy", "switches", "mean s", "p50", "p95", "p99", "max", "> 10 s", "GPU-s lost", "GPU h", "Jain", "unserved",
)  # fmt: skip
_COLORS = {"loading": "#d4d4d4", "waking": "#e9e9e9", "draining": "#555555", "stopping": "#000000"}

_MORE = ("#ffd92f", "#66c2a5", "#e7298a", "#1b9e77", "#a6761d", "#7fc97f", "#386cb0", "#f0027f")


def document(results: Results) -> dict[str, dict[str, dict[str, float | int]]]:
    """The JSON: medians over the seeds."""
    return {
        trace: {
            policy: {key: median(one.figures[key] for one in ran) for key in ran[0].figures}
            for policy, ran in by_policy.items()
        }
        for trace, by_policy in results.items()
    }


def show(results: Results, console: Console) -> None:
    """One table for each trace; the best of each column in bold."""
    for trace, by_policy in results.items():
        first = next(iter(by_policy.values()))[0]
        seeds = len(next(iter(by_policy.values())))
        title = f"{trace}: {first.requests} requests, {sum(first.nodes.values())} GPUs"
        made = Table(title=title + (f", medians of {seeds} seeds" if seeds > 1 else ""), title_justify="left")
        for column in _COLUMNS:
            made.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
        for policy, ran in by_policy.items():
            line = document({trace: {policy: ran}})[trace][policy]
            made.add_row(
                policy,
                f"{line['switches']:.0f}",
                f"{line['wait_mean_s']:.2f}",
                *(f"{line[f'wait_{each}_s']:.1f}" for each in ("p50", "p95", "p99", "max")),
                f"{100 * median(one.over_10_s for one in ran):.1f} %",
                f"{line['device_s_lost']:,.0f}",
                f"{line['gpu_hours']:.1f}",
                f"{line['jain']:.3f}",
                f"{median(one.unserved for one in ran):.0f}",
            )
        console.print(made)


def draw_waits(trace: str, by_policy: Mapping[str, Sequence[Outcomes]], path: Path) -> None:
    """For each policy, the share of the requests that waited longer than a number of seconds."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    styles = ("-", "--", ":")
    for index, (policy, ran) in enumerate(by_policy.items()):
        middle = [max(0.1, median(one.curve[share] for one in ran)) for share in range(101)]
        axis.plot(middle, [100 - share for share in range(101)], styles[index // 10 % 3], label=policy, linewidth=1.6)
    axis.set_xscale("log")
    axis.set(xlabel="seconds waited (0.1: none)", ylabel="requests that waited longer, %", title=trace, ylim=(0, 100))
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_devices(one: Outcomes, path: Path) -> None:
    """Every device over the run: the models it serves (a colour and the share of its memory each), and when one of them
    loads, drains or stops."""
    pyplot = _pyplot()
    from matplotlib.patches import Patch

    places = [(node, gpu) for node, size in one.nodes.items() for gpu in range(size)]
    rows = {place: row for row, place in enumerate(places)}
    models = sorted({span.model for span in one.spans})
    shades = [*pyplot.get_cmap("tab20").colors[:14], *pyplot.get_cmap("tab20b").colors, *_MORE]  # no greys
    color = {model: shades[index % len(shades)] for index, model in enumerate(models)}
    unit, scale = ("hours", 3600.0) if one.end_s > 7200 else ("seconds", 1.0)
    figure, axis = pyplot.subplots(figsize=(13, 1.8 + 0.42 * len(rows)))
    offsets = _offsets(one.spans)
    stripes: dict[tuple[float, float, Any], list[tuple[float, float]]] = {}
    for span in one.spans:
        shade = _COLORS.get(span.state, color[span.model])
        for gpu in span.gpus:
            low = rows[span.node, gpu] - 0.45 + 0.9 * offsets[span.engine, gpu]
            drawn = (span.begin / scale, (span.end - span.begin) / scale)
            stripes.setdefault((low, 0.9 * span.share, shade), []).append(drawn)
    for (low, height, shade), found in stripes.items():
        axis.broken_barh(found, (low, height), facecolors=shade, linewidth=0)
    axis.set_yticks(list(rows.values()), [f"{node} GPU {gpu}" for node, gpu in rows], fontsize=7)
    axis.set(xlabel=unit, xlim=(0, one.end_s / scale), ylim=(len(rows) - 0.5, -0.5))
    axis.set_title(f"{one.cell.label}, {one.cell.policy}", fontsize=10, loc="left")
    patches = [Patch(color=shade, label=state) for state, shade in _COLORS.items() if state != "waking"]
    patches += [Patch(color=color[model], label=model) for model in models[:20]]
    below = (0, -0.5 / len(rows) - 0.06)
    axis.legend(handles=patches, fontsize=6, ncols=12, loc="upper left", bbox_to_anchor=below)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _offsets(spans: Sequence[Span]) -> dict[tuple[str, int], float]:
    """Where each engine lies in each of its GPUs' memory, from 0: the lowest place that is free as long as it lives."""
    lives: dict[tuple[str, int, str], tuple[float, float, float]] = {}
    for span in spans:
        for gpu in span.gpus:
            begin, end, _ = lives.get((span.node, gpu, span.engine), (span.begin, span.end, 0.0))
            lives[span.node, gpu, span.engine] = (min(begin, span.begin), max(end, span.end), span.share)
    taken: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    found: dict[tuple[str, int], float] = {}
    for (node, gpu, engine), (begin, end, share) in sorted(lives.items(), key=lambda item: (item[1][0], item[0])):
        there = taken[node, gpu] = [one for one in taken.get((node, gpu), []) if one[2] > begin]
        low = 0.0
        for start, above, _ in sorted(there):
            if low + share <= start + 1e-9:
                break
            low = above
        found[engine, gpu] = min(low, 1.0 - share)
        there.append((low, low + share, end))
    return found


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
