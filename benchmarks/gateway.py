"""What the gateway costs a warm request: the same load straight to an engine and through the edge, in turn.

The engine is uvicorn, as vLLM's server is, with nothing behind it; both ways speak mutual TLS to it; the way through
the edge checks an API key and looks the model up. Each round measures both, one after the other, and what is reported
is the median over the rounds of the difference or the ratio *within* a round: a neighbour's load then falls on both.

    python -m benchmarks.gateway [--rounds 5] [--doorman]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import doorman
from benchmarks.load import Result
from tests.support.edges import ROOT, Edge, FakeEngine, chat, running_edge, until

OUT = ROOT / "build" / "bench"
TARGETS = {"added_p50_ms": 0.12, "rps_ratio": 0.95, "stream_ratio": 0.97, "added_first_token_ms": 5.0}
TOKENS_PER_S = 50
"""Of one stream; 32 of them are more than most engines give."""


@dataclass(frozen=True)
class Case:
    """One kind of load."""

    name: str
    clients: int
    seconds: float
    model: str
    text: str
    stream: bool = False


CASES = (
    Case("one client", 1, 1.5, "fast", "hello"),
    Case("16 clients", 16, 2.0, "fast", "hello"),
    Case("32 streams", 32, 2.5, "paced", "hello @tokens=25", stream=True),
    # For the record, without a target: an engine without uvicorn, faster than any real one.
    Case("16 clients, bare engine", 16, 1.5, "bare", "hello"),
)


@dataclass(frozen=True)
class Measured:
    """One case one way in one round."""

    case: str
    way: str
    load: Result
    edge_us: float
    """Processor time of the edge for one request."""


async def measure(edge: Edge, engine: FakeEngine, case: Case, way: str) -> Measured:
    """Run the load generator once. ``way``: ``direct`` or ``gateway``."""
    host, _, port = (engine.address if way == "direct" else edge.url.removeprefix("http://")).rpartition(":")
    key = edge.runtime.slot_key(engine.slot) if way == "direct" else edge.user_key
    argv = [sys.executable, "-m", "benchmarks.load", "--host", host, "--port", port]
    argv += ["--clients", str(case.clients), "--seconds", str(case.seconds)]
    if way == "direct":
        argv += ["--ca", str(edge.layout.ca), "--identity", str(edge.layout.edge_identity)]
    headers = {"host": "gateway", "authorization": f"Bearer {key}"}
    asked = {
        "path": "/v1/chat/completions",
        "headers": headers,
        "body": chat(case.model, case.text, stream=case.stream),
    }
    assert edge.child is not None
    before = _processor_s(edge.child.pid)
    child = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    said, _ = await child.communicate(json.dumps(asked).encode())
    if child.returncode:
        raise SystemExit(f"the load generator failed with exit code {child.returncode}")
    load = Result(**json.loads(said))
    return Measured(case.name, way, load, 1e6 * (_processor_s(edge.child.pid) - before) / max(1, load.requests))


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(rounds: int, console: Console) -> list[list[Measured]]:
    """All rounds. The order of the two ways alternates, so that neither always goes first."""
    async with running_edge(slots=64, servers_per_slot=8) as edge:
        uvicorn = "benchmarks.engine"
        rate = ("--token-rate", str(TOKENS_PER_S))
        engines = {
            "fast": await edge.start_engine("fast", recording=False, module=uvicorn),
            "paced": await edge.start_engine("paced", *rate, recording=False, module=uvicorn),
            "bare": await edge.start_engine("bare", recording=False),
        }
        for engine in engines.values():
            await edge.runtime.open(engine.slot, engine.server, engine.address, 256)
            await until(partial(edge.is_up, engine), "the edge reports the engine up")
        measured: list[list[Measured]] = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=rounds * len(CASES) * 2)
            for number in range(rounds):
                this: list[Measured] = []
                for case in CASES:
                    for way in ("direct", "gateway") if number % 2 == 0 else ("gateway", "direct"):
                        this.append(await measure(edge, engines[case.model], case, way))
                        progress.advance(task)
                measured.append(this)
        return measured


def summary(rounds: list[list[Measured]]) -> dict[str, Any]:
    """The figures, and what they were computed from."""
    values: dict[str, list[float]] = {name: [] for name in (*TARGETS, "bare_rps_ratio")}
    for measured in rounds:
        at = {(m.case, m.way): m.load for m in measured}
        one, many, streams, bare = ((at[case.name, "direct"], at[case.name, "gateway"]) for case in CASES)
        values["added_p50_ms"].append(one[1].p50_ms - one[0].p50_ms)
        values["rps_ratio"].append(_rps(many[1]) / _rps(many[0]))
        values["bare_rps_ratio"].append(_rps(bare[1]) / _rps(bare[0]))
        values["stream_ratio"].append(
            (streams[1].tokens / streams[1].seconds) / (streams[0].tokens / streams[0].seconds)
        )
        values["added_first_token_ms"].append(streams[1].first_token_p50_ms - streams[0].first_token_p50_ms)
    flat = [m for measured in rounds for m in measured]
    found: dict[str, Any] = {name: round(median(each), 4) for name, each in values.items()}
    found["failed"] = sum(m.load.failed for m in flat)
    found["edge_cpu_us_per_request"] = round(median(m.edge_us for m in flat if _is(m, 1, "gateway")), 1)
    found["targets"] = TARGETS
    found["met"] = {name: _met(name, found[name]) for name in TARGETS}
    found["cores"] = os.cpu_count()
    found["load_average"] = os.getloadavg()[0]
    found["per_round"] = {name: [round(value, 4) for value in each] for name, each in values.items()}
    found["rounds"] = [[asdict(m) for m in measured] for measured in rounds]
    return found


def _rps(load: Result) -> float:
    return load.requests / load.seconds


def _is(measured: Measured, case: int, way: str) -> bool:
    return measured.case == CASES[case].name and measured.way == way


def _met(name: str, value: float) -> bool:
    return value >= TARGETS[name] if name.endswith("_ratio") else value <= TARGETS[name]


def table(rounds: list[list[Measured]], found: dict[str, Any]) -> Table:
    """What a person reads."""
    shown = Table(title=f"edge against engine, {found['cores']} cores, medians of {len(rounds)} rounds")
    for column in ("", "direct", "gateway", "", "target", "met"):
        shown.add_column(column, justify="left" if not column else "right")
    flat = [m for measured in rounds for m in measured]

    def ways(case: int, unit: str, value: str) -> list[str]:
        reads: dict[str, Callable[[Measured], float]] = {
            "p50": lambda m: m.load.p50_ms,
            "rps": lambda m: _rps(m.load),
            "tps": lambda m: m.load.tokens / m.load.seconds,
            "first": lambda m: m.load.first_token_p50_ms,
        }
        both = (median(reads[value](m) for m in flat if _is(m, case, way)) for way in ("direct", "gateway"))
        return [f"{number:,.3f} {unit}" if unit == "ms" else f"{number:,.0f} {unit}" for number in both]

    rows = (
        ("p50, one client", ways(0, "ms", "p50"), "added_p50_ms", "+{:.3f} ms", "< {} ms"),
        ("requests, 16 clients", ways(1, "/s", "rps"), "rps_ratio", "x {:.2f}", ">= {}"),
        ("tokens, 32 streams", ways(2, "/s", "tps"), "stream_ratio", "x {:.2f}", ">= {}"),
        ("first token, 32 streams", ways(2, "ms", "first"), "added_first_token_ms", "+{:.2f} ms", "< {} ms"),
    )
    for title, both, name, how, target in rows:
        yes = "yes" if found["met"][name] else "NO"
        shown.add_row(title, *both, how.format(found[name]), target.format(TARGETS[name]), yes)
    return shown


def picture(found: dict[str, Any], path: Path) -> bool:
    """Each round's value against its target; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TARGETS), figsize=(13, 3.2), layout="constrained")
    for axis, (name, target) in zip(axes, TARGETS.items(), strict=True):
        values = found["per_round"][name]
        axis.plot(range(1, len(values) + 1), values, "o-", label="round")
        axis.axhline(found[name], color="black", linewidth=1, label="median")
        axis.axhline(target, color="red", linestyle="--", linewidth=1, label="target")
        axis.set_title(name)
        axis.set_xlabel("round")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    """The program: exit code 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--doorman", action="store_true", help="measure what a doorman adds instead")
    given = parser.parse_args()
    console = Console()
    if given.doorman:
        sys.exit(1 if doorman.report(given.rounds, console, OUT) else 0)
    rounds = asyncio.run(run(given.rounds, console))
    found = summary(rounds)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gateway.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(rounds, found))
    console.print(f"an engine without uvicorn, 16 clients: x {found['bare_rps_ratio']:.2f}")
    console.print(f"edge: {found['edge_cpu_us_per_request']} us of processor time a request; {found['failed']} failed")
    written = ["gateway.json"] + (["gateway.png"] if picture(found, OUT / "gateway.png") else [])
    console.print(f"written to {OUT.relative_to(ROOT)}: {', '.join(written)}")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
