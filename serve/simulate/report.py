"""Reports of the runs: a table, the JSON, and two kinds of pictures."""

from __future__ import annotations

from collections import Counter
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
_COLORS = {
    "loading": "#d4d4d4", "falling-asleep": "#a3b1bf", "waking": "#00e5ff",
    "draining": "#555555", "stopping": "#000000",
}  # fmt: skip
_ALWAYS = ("loading", "draining", "stopping")

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
        width = 2.6 if index == 0 else 1.4
        axis.plot(middle, [100 - share for share in range(101)], styles[index // 10 % 3], label=policy, linewidth=width)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="seconds waited (0.1: none)", ylabel="requests that waited longer, %", title=trace, ylim=(0, 100))
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def draw_devices(one: Outcomes, path: Path) -> None:
    """Every device over the run: the models it serves (a colour and the share of its memory each), when one of them
    loads, wakes, drains, falls asleep or stops, and below them, in thin lines, those that sleep."""
    pyplot = _pyplot()
    from matplotlib.patches import Patch

    places = [(node, gpu) for node, size in one.nodes.items() for gpu in range(size)]
    rows = {place: row for row, place in enumerate(places)}
    models = sorted({span.model for span in one.spans})
    shades = [*pyplot.get_cmap("tab20").colors[:14], *pyplot.get_cmap("tab20b").colors, *_MORE]  # no greys
    color = {model: shades[index % len(shades)] for index, model in enumerate(models)}
    unit, scale = ("hours", 3600.0) if one.end_s > 7200 else ("seconds", 1.0)
    height = 1.0 + 0.42 * len(rows)
    figure, axis = pyplot.subplots(figsize=(13, height), layout="none")
    awake, asleep = _lives(one.spans)
    most = _most_at_once(asleep)
    tall = 0.7 if most else 0.9
    stripes: dict[tuple[float, float, Any], list[tuple[float, float]]] = {}
    for lives, low, whole in ((awake, -0.45, tall), (asleep, 0.27, 0.18)):
        offsets = _offsets(lives, None if lives is awake else 1 / max(1, most))
        for key, found in lives.items():
            for span in found:
                share = span.share if lives is awake else 1 / most
                shade = _COLORS.get(span.state, color[span.model])
                at = (rows[key[:2]] + low + whole * offsets[key], whole * share, shade)
                stripes.setdefault(at, []).append((span.begin / scale, (span.end - span.begin) / scale))
    for (begins, tallness, shade), found_at in stripes.items():
        axis.broken_barh(found_at, (begins, tallness), facecolors=shade, linewidth=0)
    axis.set_yticks(list(rows.values()), [f"{node} GPU {gpu}" for node, gpu in rows], fontsize=7)
    axis.set(xlabel=unit, xlim=(0, one.end_s / scale), ylim=(len(rows) - 0.5, -0.5))
    axis.set_title(f"{one.cell.label}, {one.cell.policy}", fontsize=10, loc="left")
    states = {span.state for span in one.spans}
    patches = [Patch(color=shade, label=state) for state, shade in _COLORS.items() if state in states | {*_ALWAYS}]
    patches += [Patch(color=color[model], label=model) for model in models[:43]]
    below_in = 0.55 / (0.77 * height)
    axis.legend(handles=patches, fontsize=6, ncols=12, loc="upper left", bbox_to_anchor=(0, -below_in))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


_Life = tuple[str, int, str, int]
"""Node, GPU, engine, which of its times awake or asleep."""


def _lives(spans: Sequence[Span]) -> tuple[dict[_Life, list[Span]], dict[_Life, list[Span]]]:
    """Engines by GPU, awake and asleep: each time that they are is a life of its own, with a place of its own."""
    slept: Counter[str] = Counter()
    awake: dict[_Life, list[Span]] = {}
    asleep: dict[_Life, list[Span]] = {}
    for span in spans:
        sleeps = span.state == "asleep"
        slept[span.engine] += sleeps
        for gpu in span.gpus:
            (asleep if sleeps else awake).setdefault((span.node, gpu, span.engine, slept[span.engine]), []).append(span)
    return awake, asleep


def _most_at_once(lives: Mapping[_Life, Sequence[Span]]) -> int:
    """The most lives at a time on one GPU."""
    changes = sorted(
        (key[:2], at, by) for key, found in lives.items() for at, by in ((found[0].begin, 1), (found[-1].end, -1))
    )
    most = now = 0
    for _, _, by in changes:
        now += by
        most = max(most, now)
    return most


def _offsets(lives: Mapping[_Life, Sequence[Span]], of_each: float | None) -> dict[_Life, float]:
    """Where each life lies on its GPU, from 0 to 1: the lowest place that is free as long as it lasts. ``of_each``: the
    share of every one; ``None``: its own."""
    taken: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    offsets: dict[_Life, float] = {}
    for key, found in sorted(lives.items(), key=lambda item: (item[1][0].begin, item[0])):
        begin, end, share = found[0].begin, found[-1].end, of_each or found[0].share
        there = taken[key[:2]] = [one for one in taken.get(key[:2], []) if one[2] > begin]
        low = 0.0
        for start, above, _ in sorted(there):
            if low + share <= start + 1e-9:
                break
            low = above
        offsets[key] = min(low, 1.0 - share)
        there.append((low, low + share, end))
    return offsets


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
