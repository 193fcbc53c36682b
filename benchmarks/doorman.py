"""What a doorman costs a warm request: ``python -m benchmarks.gateway --doorman``.

The same uvicorn application three times: plain on loopback, with mutual TLS of its own as vLLM has it, and plain on a
Unix socket behind a doorman. Each round measures five ways one after the other; what is reported is the median over the
rounds of differences within a round.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.load import Result
from serve.agent.doorman import Doorman, behind, listener
from serve.agent.engines.start import Bind, TlsFiles
from tests.support.edges import ROOT, Edge, FakeEngine, chat, running_edge, until

TARGET_MS = 0.2
ENGINE = "benchmarks.engine"
DIRECT = ("plain", "own TLS", "doorman")
THROUGH = ("gateway, own TLS", "gateway, doorman")
CASES = {"one client": (1, 1.5), "16 clients": (16, 2.0)}
Round = dict[tuple[str, str], Result]
"""By case and way."""


async def guarded_engine(edge: Edge, folder: Path) -> FakeEngine:
    """The engine behind a doorman, with the key of a slot of its own."""
    slot = len(set(edge.names.values()))
    edge.names["guarded"] = slot
    await edge.runtime.sync_slots(edge.names, (slot,))
    inner = Bind("127.0.0.1", 0, str(folder / "e.sock"))
    tls = TlsFiles(edge.layout.engine_key, edge.layout.engine_certificate, edge.layout.ca)
    engine = (sys.executable, "-m", ENGINE, "--model", "guarded", "--uds", inner.socket)
    argv, env = behind(Doorman(inner, tls, edge.runtime.slot_key(slot)), engine, dict(os.environ))
    with listener("127.0.0.1") as door:
        child = subprocess.Popen(  # noqa: ASYNC220
            argv, env=env, cwd=ROOT, start_new_session=True, stdin=door.fileno(), stdout=subprocess.PIPE, text=True
        )
        address = f"127.0.0.1:{door.getsockname()[1]}"
    return FakeEngine(child, address, slot, 0, folder)


async def measure(edge: Edge, engine: FakeEngine, model: str, way: str, clients: int, seconds: float) -> Result:
    """Run the load generator once."""
    through = way in THROUGH
    host, _, port = (edge.url.removeprefix("http://") if through else engine.address).rpartition(":")
    argv = [sys.executable, "-m", "benchmarks.load", "--host", host, "--port", port]
    argv += ["--clients", str(clients), "--seconds", str(seconds)]
    if not through and way != "plain":
        argv += ["--ca", str(edge.layout.ca), "--identity", str(edge.layout.edge_identity)]
    key = edge.user_key if through else edge.runtime.slot_key(engine.slot)
    headers = {"host": "gateway", "authorization": f"Bearer {key}"}
    asked = {"path": "/v1/chat/completions", "headers": headers, "body": chat(model, "hello", stream=False)}
    child = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    said, _ = await child.communicate(json.dumps(asked).encode())
    if child.returncode:
        raise SystemExit(f"the load generator failed with exit code {child.returncode}")
    return Result(**json.loads(said))


async def run(rounds: int, console: Console) -> list[Round]:
    """All rounds; the order of the ways is reversed every other time."""
    async with running_edge(slots=4) as edge:
        folder = edge.layout.run / "door"
        folder.mkdir(mode=0o700)
        plain = await edge.start_engine("plain", "--ssl-certfile", "", recording=False, module=ENGINE)
        own = await edge.start_engine("own", recording=False, module=ENGINE)
        guarded = await guarded_engine(edge, folder)
        try:
            for engine in (own, guarded):
                await edge.runtime.open(engine.slot, engine.server, engine.address, 256)
                await until(partial(edge.is_up, engine), "the edge reports the engine up")
            engines = {"plain": plain, "own TLS": own, "doorman": guarded}
            measured: list[Round] = []
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("measuring", total=rounds * len(CASES) * 5)
                for number in range(rounds):
                    this: Round = {}
                    for case, (clients, seconds) in CASES.items():
                        for way in (*DIRECT, *THROUGH)[:: 1 if number % 2 == 0 else -1]:
                            name = way.removeprefix("gateway, ")
                            model = {"plain": "plain", "own TLS": "own", "doorman": "guarded"}[name]
                            this[case, way] = await measure(edge, engines[name], model, way, clients, seconds)
                            progress.advance(task)
                    measured.append(this)
            return measured
        finally:
            os.killpg(guarded.child.pid, signal.SIGKILL)
            guarded.child.wait()


def summary(rounds: list[Round]) -> dict[str, Any]:
    """The figures, and what they were computed from."""
    one = [{way: this["one client", way].p50_ms for way in (*DIRECT, *THROUGH)} for this in rounds]
    added = {
        "to_a_plain_engine_ms": [p50["doorman"] - p50["plain"] for p50 in one],
        "to_one_with_its_own_tls_ms": [p50["doorman"] - p50["own TLS"] for p50 in one],
        "through_the_gateway_ms": [p50["gateway, doorman"] - p50["gateway, own TLS"] for p50 in one],
    }
    found: dict[str, Any] = {name: round(median(values), 4) for name, values in added.items()}
    found["target_ms"] = TARGET_MS
    found["met"] = found["through_the_gateway_ms"] < TARGET_MS
    found["failed"] = sum(load.failed for this in rounds for load in this.values())
    found["cores"] = os.cpu_count()
    found["load_average"] = os.getloadavg()[0]
    found["per_round"] = {name: [round(value, 4) for value in values] for name, values in added.items()}
    found["rounds"] = [{f"{case}, {way}": asdict(load) for (case, way), load in this.items()} for this in rounds]
    return found


def table(rounds: list[Round], found: dict[str, Any]) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"an engine with and without a doorman, {found['cores']} cores, medians of {len(rounds)} rounds"
    )
    for column in ("", "p50, one client", "requests/s, 16 clients"):
        shown.add_column(column, justify="right" if column else "left")
    for way in (*DIRECT, *THROUGH):
        p50 = median(this["one client", way].p50_ms for this in rounds)
        rate = median(load.requests / load.seconds for this in rounds if (load := this["16 clients", way]))
        shown.add_row(way, f"{p50:.3f} ms", f"{rate:,.0f}")
    return shown


def report(rounds: int, console: Console, out: Path) -> int:
    """Measure, print, write ``doorman.json`` to ``out``. Returns how many requests failed."""
    measured = asyncio.run(run(rounds, console))
    found = summary(measured)
    out.mkdir(parents=True, exist_ok=True)
    (out / "doorman.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(measured, found))
    met = "met" if found["met"] else "NOT met"
    console.print(
        f"a doorman adds {found['through_the_gateway_ms']:+.3f} ms through the gateway, compared with an engine's own "
        f"TLS (target < {TARGET_MS} ms: {met}), {found['to_a_plain_engine_ms']:+.3f} ms to an engine without TLS"
    )
    return int(found["failed"])
