"""Two keys at one loaded model: what one who asks for one answer at a time waits beside one who sends many requests.

The edge is a real one; the engine is a fake of a fixed rate: it works on ``AT_A_TIME`` requests, each takes
``REQUEST_S``, or up to a fifth more or less, and what is over that waits in it in the order of arrival, as in vLLM.
"Engine's queue" is the edge without a limit, as if it did not know how many the engine takes. What is reported is the
median over the rounds; the one is compared with itself alone in the same round.

    python -m benchmarks.fairness [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.load import Result
from gateway_plugin.edge.key import PriorityClass
from gateway_plugin.edge.keys import KeyStore
from tests.support.edges import ROOT, Edge, FakeEngine, chat, running_edge, until

OUT = ROOT / "build" / "bench"
AT_A_TIME = 8
REQUEST_S = 0.2
RATIO_MAX = 2.0
"""Target: the one's latency beside others, over its latency alone."""
_WARM_S, _MEASURED_S = 5.0, 5.0
_ONE, _MANY, _BATCH = "one", "many", "batch"


@dataclass(frozen=True)
class Case:
    """``clients`` of a key that begins first, and of the one that is measured."""

    name: str
    other: str
    others: int
    mine: int = 1
    limit: int = AT_A_TIME
    """The edge's limit for the engine; 0: none."""
    target: bool = True


ALONE = Case("alone", _MANY, 0)
CASES = (
    ALONE,
    Case("beside 100, engine's queue", _MANY, 100, limit=0, target=False),
    Case("beside 100", _MANY, 100),
    Case("beside 100 of a batch key", _BATCH, 100),
    Case("10 beside 20", _MANY, 20, mine=10, target=False),
    Case("20 beside 20 of a batch key", _BATCH, 20, mine=20, target=False),
)


@dataclass(frozen=True)
class Measured:
    """One case in one round."""

    case: str
    mine: Result
    other: Result | None


async def load(edge: Edge, key: str, clients: int, seconds: float) -> Result:
    """Run the load generator: ``clients`` connections, each with one request at a time."""
    host, _, port = edge.url.removeprefix("http://").rpartition(":")
    argv = [sys.executable, "-m", "benchmarks.load", "--host", host, "--port", port]
    argv += ["--clients", str(clients), "--seconds", str(seconds)]
    asked = {
        "path": "/v1/chat/completions",
        "headers": {"host": "gateway", "authorization": f"Bearer {key}"},
        "body": chat("paced", f"@sleep={0.8 * REQUEST_S}-{1.2 * REQUEST_S}"),
    }
    child = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    said, _ = await child.communicate(json.dumps(asked).encode())
    if child.returncode:
        raise SystemExit(f"the load generator failed with exit code {child.returncode}")
    return Result(**json.loads(said))


async def measure(edge: Edge, engine: FakeEngine, keys: dict[str, str], case: Case) -> Measured:
    """The others begin, and go on until the one has been measured."""
    await edge.runtime.limit(engine.slot, engine.server, case.limit)
    if not case.others:
        return Measured(case.name, await load(edge, keys[_ONE], case.mine, _MEASURED_S), None)
    other = asyncio.create_task(load(edge, keys[case.other], case.others, _WARM_S + _MEASURED_S + 1))
    await asyncio.sleep(_WARM_S)
    mine = await load(edge, keys[_ONE], case.mine, _MEASURED_S)
    return Measured(case.name, mine, await other)


async def run(rounds: int, console: Console) -> list[list[Measured]]:
    """All rounds."""
    classes: tuple[tuple[str, PriorityClass], ...] = (
        (_ONE, "interactive"), (_MANY, "interactive"), (_BATCH, "batch")
    )  # fmt: skip
    async with running_edge() as edge:
        keys = {name: KeyStore(edge.layout).create(name, "user", priority) for name, priority in classes}
        engine = await edge.start_engine("paced", "--at-a-time", str(AT_A_TIME), recording=False)
        await edge.runtime.open(engine.slot, engine.server, engine.address, AT_A_TIME)
        await until(lambda: edge.is_up(engine), "the edge reports the engine up")
        measured: list[list[Measured]] = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=rounds * len(CASES))
            for _ in range(rounds):
                this = []
                for case in CASES:
                    this.append(await measure(edge, engine, keys, case))
                    progress.advance(task)
                measured.append(this)
        return measured


def summary(rounds: list[list[Measured]]) -> dict[str, Any]:
    """The figures, and what they were computed from."""
    cases: dict[str, dict[str, Any]] = {}
    for index, case in enumerate(CASES):
        rows = [measured[index] for measured in rounds]
        alone = [measured[0].mine for measured in rounds]
        pairs = list(zip(rows, alone, strict=True))
        other = [row.other.requests / row.other.seconds for row in rows if row.other is not None]
        cases[case.name] = {
            "p50_ms": round(median(row.mine.p50_ms for row in rows), 1),
            "p95_ms": round(median(row.mine.p95_ms for row in rows), 1),
            "p50_ratio": round(median(row.mine.p50_ms / one.p50_ms for row, one in pairs), 2),
            "p95_ratio": round(median(row.mine.p95_ms / one.p95_ms for row, one in pairs), 2),
            "rps": round(median(row.mine.requests / row.mine.seconds for row in rows), 2),
            "other_rps_whole_run": round(median(other), 2) if other else None,
        }
    found: dict[str, Any] = {"cases": cases, "target_ratio": RATIO_MAX}
    targets = [cases[case.name] for case in CASES if case.target]
    found["met"] = all(max(row["p50_ratio"], row["p95_ratio"]) <= RATIO_MAX for row in targets)
    found["failed"] = sum(row.mine.failed + (row.other.failed if row.other else 0) for rows in rounds for row in rows)
    found["cores"] = os.cpu_count()
    found["load_average"] = os.getloadavg()[0]
    found["rounds"] = [[asdict(row) for row in rows] for rows in rounds]
    return found


def table(found: dict[str, Any], rounds: int) -> Table:
    """What a person reads."""
    title = f"beside another key, an engine of {AT_A_TIME / REQUEST_S:.0f} requests/s, medians of {rounds} rounds"
    shown = Table(title=title)
    for column in ("", "p50 ms", "p95 ms", "p50 x", "p95 x", "req/s", "target", "met"):
        shown.add_column(column, justify="left" if not column else "right")
    for case in CASES:
        row = found["cases"][case.name]
        worst = max(row["p50_ratio"], row["p95_ratio"])
        figures = (f"{row[name]:,.0f}" for name in ("p50_ms", "p95_ms"))
        ratios = (f"{row[name]:.2f}" for name in ("p50_ratio", "p95_ratio"))
        met = (f"<= {RATIO_MAX:.0f}", "yes" if worst <= RATIO_MAX else "NO") if case.target else ("", "")
        shown.add_row(case.name, *figures, *ratios, f"{row['rps']:.1f}", *met)
    return shown


def main() -> None:
    """The program: exit code 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    console = Console()
    rounds = asyncio.run(run(given.rounds, console))
    found = summary(rounds)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "fairness.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(found, len(rounds)))
    console.print(f"{found['failed']} failed; written to {OUT.relative_to(ROOT)}: fairness.json")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
