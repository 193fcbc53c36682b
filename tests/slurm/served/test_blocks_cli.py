"""``gateway blocks`` on a real Slurm: of a block that runs, and of one that waits for a free node."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gateway_plugin.paths import block_folder
from gateway_plugin.processes import block_processes
from tests.support.gateways import ROOT, Gateway, chat_body, wait_for
from tests.support.slurm.gateways import engine_nodes, ever_submitted, pinned, queued
from tests.support.slurm.virtual import VirtualSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def waiting_chat(gateway: Gateway, model: str) -> Iterator[subprocess.Popen[str]]:
    """``gateway chat MODEL hello``, interrupted at the end."""
    argv = [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(gateway.layout.state), "chat", model, "hi"]
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=gateway.environment, cwd=ROOT
    ) as chat:
        try:
            yield chat
        finally:
            chat.kill()


@contextmanager
def streamed(gateway: Gateway, model: str, tokens: int) -> Iterator[Iterator[str]]:
    """An answer that has begun: what comes after its first piece."""
    body = chat_body(model, f"@tokens={tokens}", stream=True, max_tokens=tokens)
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as stream:
        pieces = stream.iter_text()
        next(pieces)
        yield pieces


def rows(gateway: Gateway, *options: str) -> dict[str, dict[str, Any]]:
    found = json.loads(gateway.cli("blocks", "list", "--json", *options).stdout)
    return {row["name"]: row for row in found if row["name"]}


def in_state(gateway: Gateway, state: str, *options: str) -> dict[str, Any] | None:
    return next((row for row in rows(gateway, *options).values() if row["state"] == state), None)


def nothing_left(gateway: Gateway, block: str) -> None:
    """Of a block on its node: no process and no folder."""
    folder = block_folder(gateway.layout.run, block)
    wait_for(lambda: not folder.exists(), 30, f"the folder of {block} is gone")
    assert block_processes(block, folder) == ()


def test_blocks_are_seen_and_cancelled_while_they_wait_and_while_they_run(slurm: VirtualSlurm, shared: Gateway) -> None:
    gateway = shared
    assert not rows(gateway), "the first test here: no block yet"
    host = pinned(gateway, "a", timeout_s=240)["a"]
    gateway.cli("models", "unpin", "a")
    slurm.run("sbatch", "-N1", "--exclusive", "-t", "10", "-J", "somebody", "-o", "/dev/null", "--wrap", "sleep 600")
    wait_for(lambda: "RUNNING" in slurm.run("squeue", "-h", "-n", "somebody", "-o", "%T"), 30, "somebody's job runs")
    with gateway.client() as client:
        client.post("/gateway/v1/models/pin", json={"model": "a"}).raise_for_status()  # b must not take its place

    (engine,) = gateway.status()["engines"]  # on the node's own address, not this machine's
    assert engine["address"].startswith(f"{slurm.places.network}.{host.removeprefix('n')}:")

    # One runs, one waits: both are listed, and who waits is told why.
    with waiting_chat(gateway, "b") as chat:
        wait_for(lambda: (row := in_state(gateway, "pending")) and row["starts_in_s"], 60, "an expected start")
        assert chat.stderr is not None
        said = next(line for line in chat.stderr if "job" in line and "waits" in line)
        pending, serving = in_state(gateway, "pending"), in_state(gateway, "serving")
        assert pending is not None
        assert serving is not None
        assert (pending["reason"], pending["host"]) == ("Resources", None)
        assert 0 < pending["starts_in_s"] <= 600  # when somebody's walltime ends
        assert f"b: queued (job {pending['job']} waits" in said
        assert (serving["host"], serving["models"][0]["model"]) == (host, "a")
        assert 0 < serving["ends_in_s"] <= 1800
        assert {job.block: job.id for job in queued(slurm)} == {row["name"]: row["job"] for row in (pending, serving)}
        (kind,) = gateway.status()["types"]
        assert (kind["running"], kind["pending"], kind["reason"]) == (1, 1, "Resources")
        table = gateway.cli("blocks", "list").stdout
        assert all(word in table for word in (pending["name"], "Resources", "starts in", "ends in", host))

    # The one that waits is cancelled, and no other is asked for in its stead.
    wait_for(lambda: not gateway.status()["waiting"], 30, "nobody waits any more")
    submitted = ever_submitted(slurm)
    assert gateway.cli("blocks", "cancel", pending["name"]).stdout == f"{pending['name']} is being ended\n"
    wait_for(lambda: [job.block for job in queued(slurm)] == [serving["name"]], 30, "its job is gone")
    wait_for(lambda: (in_state(gateway, "cancelled", "--all") or {}).get("name") == pending["name"], 15, "its end")
    again = gateway.cli("blocks", "cancel", pending["name"], check=False)
    assert (again.returncode, "ended" in again.stderr) == (66, True)
    assert gateway.cli("blocks", "logs", pending["name"]).stdout == ""

    # The one that runs is drained while another one waits for its node: nothing new is put on the old one.
    with ThreadPoolExecutor(1) as one, gateway.client() as client:
        one.submit(gateway.chat, "b")
        following = wait_for(lambda: (row := in_state(gateway, "pending")) and row["job"] and row, 15, "another job")
        with streamed(gateway, "a", tokens=200) as pieces:  # after its end b would take the place of a
            client.post("/gateway/v1/models/unpin", json={"model": "a"}).raise_for_status()
            drained = json.loads(gateway.cli("blocks", "drain", serving["name"], "--wait", "--json").stdout)
            assert drained["ended"]["state"] in ("cancelled", "completed"), drained
            assert "[DONE]" in "".join(pieces)  # what was in flight ended in peace
        wait_for(lambda: "b" in engine_nodes(gateway), 60, "b on the node that was given back")
    nothing_left(gateway, serving["name"])
    assert engine_nodes(gateway)["b"] == host
    second = in_state(gateway, "serving")
    assert second is not None
    assert second["name"] == following["name"]
    assert ever_submitted(slurm) - submitted == {following["job"]}

    # The one that runs is cancelled with a stream on it, which breaks off visibly.
    with streamed(gateway, "b", tokens=4000) as pieces:
        wait_for(lambda: (in_state(gateway, "serving") or {}).get("in_flight") == 1, 15, "the stream is counted")
        done = gateway.cli("blocks", "cancel", second["name"], "--json")
        assert json.loads(done.stdout)[0]["cut"] == 1
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in pieces:
                pass
    wait_for(lambda: not queued(slurm), 60, "its job is gone")
    wait_for(lambda: rows(gateway, "--all")[second["name"]]["state"] == "cancelled", 15, "its end")
    assert "leaving: told to" in gateway.cli("blocks", "logs", second["name"]).stdout
    assert not rows(gateway)
    nothing_left(gateway, second["name"])
    assert ever_submitted(slurm) - submitted == {following["job"]}
