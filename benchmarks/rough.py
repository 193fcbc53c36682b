"""Rough weather on whole gateways over TLS: floods of waiters, strangers, cold streams, ghosts; fake engines.

Each case is a gateway of its own, started as a user starts it, in a process with the case's limit of open files. The
load comes from processes of their own (``benchmarks.crowd``) with a lower priority, as callers elsewhere would leave
the gateway its processors; probes from a third one, which measures its own lateness. On a machine of few processors
read the figures with the ones beside them: who was late, and how busy the edge was.

    python -m benchmarks.rough [CASE ...]     # all of CASES by default; build/bench/rough.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.crowd import Order, Row
from benchmarks.probes import Asked, Question, probing
from gateway_plugin.edge.keys import KeyStore
from tests.support.gateways import ROOT, Gateway, chat_body, fake_model, gateway

OUT = ROOT / "build" / "bench"
_GENERATORS = 2
_NICE = 5
_LOAD_S, _LONG_LOAD_S = 8.0, 20.0
"""Of the models that many wait for; the second one lasts until all have come."""
_SETTLE_S = 1.0


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    value: float
    unit: str = "s"
    at_most: float | None = None
    """Promised; ``None``: for the record."""
    detail: bool = False
    """For the file alone."""

    @property
    def met(self) -> bool | None:
        """Whether the promise holds."""
        return None if self.at_most is None else self.value <= self.at_most


@dataclass
class Sky:
    """A gateway under load, and what to load it with."""

    gateway: Gateway
    keys: tuple[str, ...]
    figures: list[Figure] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        """Of the front door."""
        host, _, port = self.gateway.url.removeprefix("https://").rpartition(":")
        return host, int(port)

    def add(
        self, what: str, value: float, unit: str = "s", at_most: float | None = None, *, detail: bool = False
    ) -> None:
        """One more figure."""
        self.figures.append(Figure(what, round(value, 3), unit, at_most, detail))

    def request(self, body: dict[str, Any], headers: str = "") -> str:
        """The text of a POST; its key is the caller's."""
        said = json.dumps(body)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer KEY\r\n{headers}"
        return f"{head}content-type: application/json\r\ncontent-length: {len(said)}\r\n\r\n{said}"

    def order(self, kind: str, count: int, ramp_s: float, within_s: float, requests: Sequence[str] = ("",)) -> Order:
        """Callers that begin in a second."""
        start = time.monotonic() + _SETTLE_S
        keys = self.keys if kind == "ask" else ()
        return Order(*self.address, count, kind, start, ramp_s, start + within_s, tuple(requests), keys, _NICE)

    @contextmanager
    def watched(self, *questions: Question, name: str, at_most: float) -> Iterator[None]:
        """Probes while the block runs: their slowest become figures."""
        edge = self._edge()
        cpu, began = edge.cpu_times(), time.monotonic()
        psutil.cpu_times_percent()
        with probing(*self.address, self.gateway.trust, questions) as asked:
            yield
        spent, machine = edge.cpu_times(), psutil.cpu_times_percent()
        busy = spent.user + spent.system - cpu.user - cpu.system
        self._probes(asked, name, at_most)
        self.add(f"{name}: edge's processor", 100 * busy / (time.monotonic() - began), "%")
        self.add(f"{name}: machine idle", machine.idle, "%")
        self.add(f"{name}: machine taken by others (steal)", getattr(machine, "steal", 0.0), "%")

    def _probes(self, asked: Asked, name: str, at_most: float) -> None:
        for question, replies in asked.replies.items():
            took = sorted(reply.took_s for reply in replies)
            self.add(f"{name}: {question}, slowest of {len(took)}", took[-1], at_most=at_most)
            self.add(f"{name}: {question}, p99", took[int(0.99 * (len(took) - 1))], detail=True)
            handshake = max(reply.connect_s for reply in replies)
            self.add(f"{name}: {question}, slowest connection and handshake", handshake, detail=True)
            wrong = Counter(reply.trouble for reply in replies if reply.trouble)
            self.add(f"{name}: {question}, not 200 {dict(wrong) or ''}".rstrip(), sum(wrong.values()), "", 0)
        self.add(f"{name}: the probes' own lateness", asked.late_s)

    def _edge(self) -> psutil.Process:
        return next(process for process in self.gateway.processes() if process.name() == "haproxy")


@dataclass(frozen=True)
class Came:
    """What the callers of one order saw."""

    rows: list[Row]
    cpu_s: float
    late_s: float
    """The longest that a generator needed for what was ready at a time."""


class Started:
    """Generators at work on one order, its callers shared out among them."""

    def __init__(self, order: Order, processes: int = _GENERATORS) -> None:
        self._children = []
        for number in range(processes):
            share = {**asdict(order), "count": len(range(number, order.count, processes))}
            share["keys"] = order.keys[number:] + order.keys[:number]
            argv = [sys.executable, "-m", "benchmarks.crowd"]
            child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
            assert child.stdin is not None
            child.stdin.write(json.dumps(share).encode())
            child.stdin.close()
            child.stdin = None
            self._children.append(child)

    def ended(self) -> Came:
        """Wait for them."""
        said = [json.loads(child.communicate()[0]) for child in self._children]
        rows = [Row(**row) for each in said for row in each["rows"]]
        return Came(rows, sum(each["cpu_s"] for each in said), max(each["slowest_turn_s"] for each in said))


def _warm(sky: Sky) -> tuple[Question, ...]:
    """Health and a loaded model, as new callers ask and as one that keeps its connection."""
    body = json.dumps(chat_body("warm")).encode()
    path, key = "/v1/chat/completions", sky.keys[-1]
    return (
        Question("/health", "/health"),
        Question("warm", path, body, key=key),
        Question("warm, kept connection", path, body, kept=True, key=key),
    )


# --- the cases ---
def waiters(sky: Sky, model: str, count: int, ramp_s: float) -> None:
    """``count`` callers of a model that is not loaded, each on a connection of its own."""
    name = f"{count:,} waiters, {f'within {ramp_s:g} s' if ramp_s else 'at once'}"
    with sky.watched(*_warm(sky), name=name, at_most=1.0):
        started = Started(sky.order("ask", count, ramp_s, 90.0, [sky.request(chat_body(model))]))
        came = started.ended()
    answered = [row for row in came.rows if row.status == 200]
    refused = [row for row in came.rows if row.status == 503 and row.retry_after and row.json]
    others = Counter(row.status or row.error for row in came.rows if row not in answered and row not in refused)
    ready_at = min((row.first for row in answered), default=0.0)
    sky.add(f"{name}: answered", len(answered), "")
    sky.add(f"{name}: refused (503, Retry-After, JSON)", len(refused), "")
    sky.add(f"{name}: anything else {dict(others) or ''}".rstrip(), sum(others.values()), "", 0)
    since: dict[str, Callable[[Row], float]] = {
        "refused after": lambda row: row.due,
        "refused after, from its request on": lambda row: row.shaken,
    }
    for what, begin in since.items():
        took = sorted(row.ended - begin(row) for row in refused) or [0.0]
        sky.add(f"{name}: {what}, p50", took[len(took) // 2], detail=True)
        sky.add(f"{name}: {what}, slowest", took[-1], at_most=5.0)
    last = max((row.ended - max(ready_at, row.due) for row in answered), default=0.0)
    sky.add(f"{name}: answered after the first answer, slowest", last, at_most=5.0)
    _generator(sky, name, came)


def strangers(sky: Sky, kind: str, count: int, seconds: float) -> None:
    """``count`` connections that say nothing, opened again when they are closed."""
    name = f"{count:,} strangers ({kind})"
    with sky.watched(*_warm(sky), name=name, at_most=1.0):
        came = Started(sky.order(kind, count, 3.0, seconds)).ended()
    sky.add(f"{name}: opened", sum(row.opened for row in came.rows), "")
    _generator(sky, name, came)


def streams(sky: Sky, count: int, waiting: int) -> None:
    """Streams that came cold run; callers of another model wait, and are let go at once."""
    name = f"{count:,} streams, {waiting} let go"
    admin = sky.gateway.key
    questions = [Question(path, path, key=admin) for path in ("/ready", "/v1/models", "/gateway/v1/status")]
    before = sky.gateway.replicas()
    body = chat_body("slow", "@tokens=80", stream=True, max_tokens=80)
    with sky.watched(*questions, name=name, at_most=2.0):
        running = Started(sky.order("ask", count, 5.0, 120.0, [sky.request(body)]), processes=1)
        time.sleep(5.0 + _LOAD_S)
        waiters = Started(sky.order("ask", waiting, 2.0, 60.0, [sky.request(chat_body("later"))]), processes=1)
        let_go = waiters.ended()
        came = running.ended()
    cut = Counter(row.status or row.error for row in came.rows if "[DONE]" not in row.tail)
    sky.add(f"{name}: streams not whole {dict(cut) or ''}".rstrip(), sum(cut.values()), "", 0)
    failed = Counter(row.status or row.error for row in let_go.rows if row.status != 200)
    sky.add(f"{name}: waiters not answered {dict(failed) or ''}".rstrip(), sum(failed.values()), "", 0)
    first = min(row.first for row in let_go.rows)
    sky.add(f"{name}: the last waiter after the first", max(row.ended for row in let_go.rows) - first)
    sky.add(f"{name}: replicas replaced", len(set(before.items()) ^ set(sky.gateway.replicas().items())), "", 0)
    _generator(sky, name, came)


def ghosts(sky: Sky, count: int) -> None:
    """Callers that do not wait ask for ``count`` models; then one that does asks for another. Room is for one."""
    name = f"{count} ghosts"
    for _ in range(2):  # the first one waits for its block
        alone = _cold_s(sky)
        sky.gateway.chat("m0")  # which takes the room
    before = _loads(sky.gateway)
    texts = [sky.request(chat_body(f"m{n}"), "x-gateway-wait: 0\r\n") for n in range(1, count + 1)]
    order = sky.order("ask", count, 0.5, 20.0, texts)
    came = Started(order, processes=1)
    time.sleep(max(0.0, order.start_at + 0.6 - time.monotonic()))
    beside = _cold_s(sky)
    statuses = Counter(row.status for row in came.ended().rows)
    sky.add(f"{name}: the other user alone", alone)
    sky.add(f"{name}: the other user behind them", beside)
    sky.add(f"{name}: delay", beside - alone, at_most=15.0)
    sky.add(f"{name}: answers {dict(statuses)}", count, "")
    time.sleep(30.0)
    sky.add(f"{name}: engines started in all, half a minute later", _loads(sky.gateway) - before, "")


def _cold_s(sky: Sky) -> float:
    began = time.monotonic()
    response = sky.gateway.chat("real")
    assert response.status_code == 200, response.text
    return time.monotonic() - began


def _loads(made: Gateway) -> int:
    return len(list(made.layout.logs.glob("engines/*.log")))


def _generator(sky: Sky, name: str, came: Came) -> None:
    begun = [row for row in came.rows if row.began]
    sky.add(f"{name}: generator began a caller late, worst", max(row.began - row.due for row in begun))
    sky.add(f"{name}: generator's longest turn", came.late_s)
    sky.add(f"{name}: generator's processor time", came.cpu_s)
    shaken = [row for row in begun if row.shaken]
    if shaken:
        span = max(row.shaken for row in shaken) - min(row.began for row in shaken)
        sky.add(f"{name}: first handshakes", len(shaken) / max(span, 1e-3), "/s")


def _catalog(memory: Path) -> dict[str, Any]:
    def cold(load_s: float, *options: str) -> dict[str, Any]:
        return fake_model(memory, "--load-delay-s", str(load_s), *options, memory_gib=0.1)

    return {
        "warm": cold(0.0),
        "slow": cold(_LOAD_S, "--token-rate", "2"),
        "later": cold(_LOAD_S),
        "cold": cold(_LONG_LOAD_S),
        "cold2": cold(_LONG_LOAD_S),
    }


def _ghostly(memory: Path) -> dict[str, Any]:
    names = (*(f"m{n}" for n in range(31)), "real")
    return {name: fake_model(memory, "--load-delay-s", "4.5", memory_gib=1.5) for name in names}


def _few_files(sky: Sky) -> None:
    waiters(sky, "cold", 1000, 0.0)


def _flood(sky: Sky) -> None:
    waiters(sky, "cold", 10_000, 10.0)
    waiters(sky, "cold2", 10_000, 0.0)


def _idle(sky: Sky) -> None:
    strangers(sky, "idle", 8500, 20.0)
    strangers(sky, "mute", 8500, 20.0)


@dataclass(frozen=True)
class Case:
    """A gateway and what it goes through."""

    files: int
    catalog: Callable[[Path], dict[str, Any]]
    run: Callable[[Sky], None]


CASES = {
    "waiters-1000": Case(4096, _catalog, _few_files),
    "waiters-10000": Case(20_000, _catalog, _flood),
    "strangers": Case(20_000, _catalog, _idle),
    "streams": Case(20_000, _catalog, lambda sky: streams(sky, 1000, 500)),
    "ghosts": Case(20_000, _ghostly, lambda sky: ghosts(sky, 30)),
}


def weather(name: str) -> list[Figure]:
    """Go through one case in this process, which has its limit of open files."""
    case = CASES[name]
    with gateway(case.catalog) as made:
        store = KeyStore(made.layout)
        sky = Sky(made, tuple(store.create(f"user{n}", "user") for n in range(24)))
        if case.catalog is _catalog:
            answer = made.chat("warm")
            assert answer.status_code == 200, answer.text
        case.run(sky)
        if os.environ.get("GATEWAY_TEST_KEEP"):
            print(made.layout.state, file=sys.stderr)
        return sky.figures


def table(name: str, figures: Sequence[Figure]) -> Table:
    """What a person reads."""
    shown = Table(title=f"{name}, {CASES[name].files} open files")
    for column in ("", "measured", "promised", "met"):
        shown.add_column(column, justify="right" if column else "left")
    for figure in (figure for figure in figures if not figure.detail):
        promised = "" if figure.at_most is None else f"<= {figure.at_most:g} {figure.unit}"
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        shown.add_row(figure.what, f"{figure.value:,.3f}".rstrip("0").rstrip(".") + f" {figure.unit}", promised, met)
    return shown


def main() -> None:
    """The program: exit code 1 if a promise was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps([asdict(figure) for figure in weather(given.cases[0])]))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "rough.json"
    found: dict[str, Any] = json.loads(path.read_text()) if given.cases and path.exists() else {}
    console = Console()
    missed = 0
    for name in given.cases or CASES:
        limit = f"--nofile={CASES[name].files}:{CASES[name].files}"
        argv = ["prlimit", limit, sys.executable, "-m", "benchmarks.rough", "--here", name]
        busy = os.getloadavg()[0]
        done = subprocess.run(argv, stdout=subprocess.PIPE, cwd=ROOT, check=True)
        figures = [Figure(**each) for each in json.loads(done.stdout.splitlines()[-1])]
        missed += sum(figure.met is False for figure in figures)
        found[name] = {
            "cores": os.cpu_count(),
            "load_average_before": busy,
            "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
        console.print(table(name, figures))
    console.print(f"{missed} promises missed; written to {path.relative_to(ROOT)}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
