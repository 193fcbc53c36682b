"""What packing gains through Globus Compute, and what the way through it adds to one chat.

The whole chain on this machine: the real client library, a real RabbitMQ, the real endpoint with its four workers; a
stand-in for the web service enforces the documented limits (20 requests within 10 s, 10 MB a submission); a fake engine
answers at once. Three ways to send prompts:

- packed: ``GlobusClient.map_chat``, 64 prompts a task;
- one task a prompt, each submitted when its prompt comes: what a loop of calls, or independent workflow tasks, come to.
  The rate limit is what it measures, so it has fewer prompts: 18 go at once, the rest at the limit's pace;
- one task a prompt, all prompts known beforehand: the SDK's own executor then submits 128 tasks at a time.

    python -m benchmarks.globus [--prompts 500] [--single 72]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from gateway_plugin.globus import GlobusClient
from gateway_plugin.globus.client.batches import Limits
from gateway_plugin.globus.client.protocol import task_request
from tests.support.globus.chain import Chain, chain, missing
from tests.support.globus.gateway import EngineAsGateway, engine_as_gateway

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "bench"
TARGET = 20.0
"""Packed against one submission a prompt, prompts a second."""
ROUNDS = 5
WINDOW_S = 10.0


@dataclass(frozen=True)
class Way:
    """One way to send prompts."""

    name: str
    prompts: int
    failed: int
    seconds: float
    tasks: int
    submissions: int
    payload_bytes: int
    refused: int
    """Requests over the rate limit, which the SDK sends again."""

    @property
    def rate(self) -> float:
        """Prompts a second."""
        return (self.prompts - self.failed) / self.seconds


def measure(made: Chain, name: str, prompts: int, run: Callable[[], int]) -> Way:
    """``run`` returns how many prompts failed. Each way begins with a window of the rate limit to itself."""
    time.sleep(WINDOW_S + 0.5)
    before, began = made.counts(), time.monotonic()
    failed = run()
    seconds, after = time.monotonic() - began, made.counts()
    added = {key: after.get(key, 0) - before.get(key, 0) for key in ("tasks", "requests", "payload_bytes", "refused")}
    return Way(
        name, prompts, failed, seconds, added["tasks"], added["requests"], added["payload_bytes"], added["refused"]
    )


def texts(count: int) -> list[str]:
    return [f"Summarise sentence number {number} in one word. @tokens=8" for number in range(count)]


def mapped(made: Chain, prompts: int, limits: Limits | None = None) -> Callable[[], int]:
    """``map_chat`` with a client that is warm: its login and its connection are not what is measured."""

    def run() -> int:
        with GlobusClient(made.endpoint_id, made.function_id, limits=limits) as client:
            answers = client.map_chat(texts(prompts), "tiny", return_errors=True, progress=False)
        return sum(not isinstance(answer, str) for answer in answers)

    return run


def executed(made: Chain, prompts: int) -> Callable[[], int]:
    """One task a prompt with the SDK's executor, which batches what waits in it."""

    def run() -> int:
        executor = made.executor()
        body: dict[str, Any] = {"model": "tiny"}
        items = [
            {"path": "/v1/chat/completions", "body": {**body, "messages": [{"role": "user", "content": text}]}}
            for text in texts(prompts)
        ]
        futures = [
            executor.submit_to_registered_function(
                made.function_id, args=(task_request(uuid.uuid4().hex, 300, True, items=[item]),)
            )
            for item in items
        ]
        failed = sum("items" not in future.result(300) for future in futures)
        executor.shutdown(wait=False, cancel_futures=True)
        executor._get_result_watcher().shutdown(wait=False, cancel_futures=True)
        return failed

    return run


def round_trips(made: Chain, gateway: EngineAsGateway) -> dict[str, list[float]]:
    """Seconds of one chat, straight and through Globus Compute, in turn."""
    found: dict[str, list[float]] = {"direct": [], "globus": []}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello @tokens=8"}]}
    headers = {"authorization": f"Bearer {gateway.key}"}
    with (
        GlobusClient(made.endpoint_id, made.function_id) as client,
        httpx.Client(base_url=gateway.url, headers=headers, trust_env=False) as straight,
    ):
        client.chat("hello", "tiny")  # connections are made
        straight.post("/v1/chat/completions", json=body)
        for _ in range(ROUNDS):
            began = time.monotonic()
            straight.post("/v1/chat/completions", json=body).raise_for_status()
            between = time.monotonic()
            client.chat("hello @tokens=8", "tiny")
            found["direct"].append(between - began)
            found["globus"].append(time.monotonic() - between)
    return found


def run(prompts: int, single: int, console: Console) -> dict[str, Any]:
    """Everything, and the figures."""
    with engine_as_gateway() as gateway, chain(gateway.url, gateway.key) as made:
        console.print("chain: RabbitMQ, stand-in, endpoint ...")
        made.start()
        os.environ.update(made.service_environment)
        mapped(made, 4)()  # the endpoint's workers start
        ways = []
        for name, count, work in (
            ("packed", prompts, mapped(made, prompts)),
            ("one submission a prompt", single, mapped(made, single, Limits(items=1))),
            ("one task a prompt, SDK batches", prompts, executed(made, prompts)),
        ):
            console.print(f"{name}: {count} prompts ...")
            ways.append(measure(made, name, count, work))
        time.sleep(WINDOW_S)
        trips = round_trips(made, gateway)
    packed, alone, batched = ways
    ratio = packed.rate / alone.rate
    return {
        "ways": [{**asdict(way), "prompts_per_s": round(way.rate, 2)} for way in ways],
        "packed_over_one_submission_a_prompt": round(ratio, 1),
        "packed_over_sdk_batches": round(packed.rate / batched.rate, 1),
        "target": TARGET,
        "met": ratio >= TARGET,
        "failed": sum(way.failed for way in ways),
        "chat_direct_s": round(median(trips["direct"]), 4),
        "chat_globus_s": round(median(trips["globus"]), 4),
        "chat_added_s": round(median(trips["globus"]) - median(trips["direct"]), 4),
        "chat_rounds": trips,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def table(found: dict[str, Any]) -> Table:
    """What a person reads."""
    shown = Table(title=f"prompts through Globus Compute, fake engine, {found['cores']} cores")
    for column in ("", "prompts", "seconds", "prompts/s", "tasks", "requests", "bytes sent", "refused (429)"):
        shown.add_column(column, justify="right" if column else "left")
    for way in found["ways"]:
        shown.add_row(
            way["name"], f"{way['prompts']}", f"{way['seconds']:.1f}", f"{way['prompts_per_s']:.1f}",
            f"{way['tasks']}", f"{way['submissions']}", f"{way['payload_bytes']:,}", f"{way['refused']}",
        )  # fmt: skip
    return shown


def main() -> None:
    """The program: exit code 1 if a prompt failed or the target was missed, 69 if the chain cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--single", type=int, default=72, help="prompts of the way that the rate limit holds up")
    given = parser.parse_args()
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        sys.exit(69)
    console = Console()
    found = run(given.prompts, given.single, console)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "globus.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(found))
    console.print(
        f"packed: x {found['packed_over_one_submission_a_prompt']} of one submission a prompt (target {TARGET:.0f}), "
        f"x {found['packed_over_sdk_batches']} of one task a prompt in the SDK's batches"
    )
    console.print(
        f"one chat: {found['chat_globus_s']:.2f} s, of which {found['chat_added_s']:.2f} s are Globus Compute's way"
    )
    console.print(f"written to {(OUT / 'globus.json').relative_to(ROOT)}")
    sys.exit(0 if found["met"] and not found["failed"] else 1)


if __name__ == "__main__":
    main()
