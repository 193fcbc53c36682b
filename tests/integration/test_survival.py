"""What dies, and what must not notice: engines, agent, edge, controller, ingress, the whole Ray head."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from gateway_plugin.processes import arguments
from tests.support.gateways import Gateway, chat_body, fake_model, gateway, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

IDLE_S = 6.0


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    with gateway(
        lambda memory: {
            "a": fake_model(memory, "--load-delay-s", "0.3"),
            "slow": fake_model(memory, "--load-delay-s", "0.3", "--token-rate", "20", memory_gib=0.2),
            "poisoned": fake_model(memory, memory_gib=0.1),
            "broken": fake_model(memory, "--crash-on-start", memory_gib=0.1),
        },
        block_idle_s=IDLE_S,
    ) as made:
        yield made


@contextmanager
def steady_load(running: Gateway, model: str) -> Iterator[list[str]]:
    """One warm request after another in a thread; yields the list of what failed, and expects some to have worked."""
    failed: list[str] = []
    answered = 0
    stop = threading.Event()

    def ask() -> None:
        nonlocal answered
        with running.client() as client:
            while not stop.is_set():
                try:
                    response = client.post("/v1/chat/completions", json=chat_body(model))
                except httpx.HTTPError as error:
                    failed.append(repr(error))
                    continue
                if response.status_code == 200:
                    answered += 1
                else:
                    failed.append(f"{response.status_code} {response.text[:200]}")
                time.sleep(0.005)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield failed
        wait_for(lambda: answered > 20 or failed, 30, "more answers")
    finally:
        stop.set()
        thread.join()


def pid_of(running: Gateway, model: str) -> int:
    engines = [engine for engine in running.status()["engines"] if engine["model"] == model]
    assert len(engines) == 1, engines
    return running.engine_pids()[engines[0]["id"]]


def warm(running: Gateway, model: str) -> int:
    response = running.chat(model)
    assert response.status_code == 200, response.text
    return pid_of(running, model)


def named(running: Gateway, words: str) -> list[psutil.Process]:
    """This gateway's processes with ``words`` in their command line (Ray puts an actor's name there)."""
    return [process for process in running.processes() if words in " ".join(arguments(process.pid))]


def serving_again(running: Gateway) -> dict[str, Any] | None:
    """The status, once the controller answers and is ready."""
    try:
        status = running.status()
    except httpx.HTTPError:
        return None
    return status if status["state"] == "ready" else None


def test_an_engine_killed_in_a_stream_breaks_the_transfer_off_visibly(running: Gateway) -> None:
    warm(running, "slow")
    with running.client() as client, pytest.raises(httpx.RemoteProtocolError):
        body = chat_body("slow", "@tokens=100", stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(pid_of(running, "slow"), signal.SIGKILL)
            for _ in lines:
                continue
    assert running.chat("slow").status_code == 200


def test_a_request_that_kills_every_engine_is_refused_after_two(running: Gateway) -> None:
    warm(running, "poisoned")
    response = running.chat("poisoned", "@crash")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "request_killed_engine"
    assert running.chat("poisoned").status_code == 200


def test_a_model_that_fails_to_load_says_why_and_harms_no_other(running: Gateway) -> None:
    warm(running, "a")
    with steady_load(running, "a") as failed:
        response = running.chat("broken")
    assert response.status_code == 503
    error = response.json()["error"]
    assert error["code"] == "model_unavailable"
    assert "it ended with exit code" in error["message"]
    assert "fake engine" not in error["message"], "what an engine said is told by /v1/models, to administrators"
    with running.client() as client:
        (entry,) = [m for m in client.get("/v1/models").json()["data"] if m["id"] == "broken"]
    assert "fake engine" in entry["reason"]
    assert int(response.headers["retry-after"]) >= 1
    assert failed == []


def test_a_killed_agent_costs_no_warm_request_and_its_engines_are_adopted(running: Gateway) -> None:
    before = warm(running, "a")
    with steady_load(running, "a") as failed:
        (agent,) = named(running, "RayNodeAgent")
        agent.kill()
        wait_for(lambda: [p for p in named(running, "RayNodeAgent") if p.pid != agent.pid], 60, "a new agent")
        wait_for(lambda: (running.status()["engines"] or [{}])[0].get("state") == "ready", 30, "engine adopted")
    assert failed == []
    assert pid_of(running, "a") == before


def test_controller_ingress_and_head_killed_under_a_warm_load(running: Gateway) -> None:
    """Also while requests of the model go through the ingress, because one of its engines just died under one."""
    killed = warm(running, "a")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.chat, "a", "@sleep=4")
        wait_for(lambda: any(one["in_flight"] for one in running.status()["engines"]), 10, "the engine has it")
        os.killpg(killed, signal.SIGKILL)
        assert asked.result().status_code == 200
    assert "/apart" in running.layout.models_map.read_text()
    before = pid_of(running, "a")
    with running.client() as client:
        client.post("/gateway/v1/models/pin", json={"model": "a"}).raise_for_status()
    blocks = {node["block"] for node in running.status()["nodes"]}
    with steady_load(running, "a") as failed:
        controller = running.status()["pid"]
        os.kill(controller, signal.SIGKILL)
        status = wait_for(lambda: (s := serving_again(running)) and s["pid"] != controller and s, 60, "controller")
        assert {engine["state"] for engine in status["engines"]} == {"ready"}

        ingresses = named(running, "ServeReplica:gateway:ingress")
        assert ingresses
        for process in ingresses:
            process.kill()
        wait_for(lambda: serving_again(running), 60, "ingress")

        kill_head(running)
        told = running.cli("status", "--json", check=False).stdout
        assert '"head"' in told
        status = wait_for(lambda: serving_again(running), 120, "the head is back")
        wait_for(lambda: (s := serving_again(running)) and s["engines"], 60, "the engine is known again")
    assert failed == []
    assert pid_of(running, "a") == before, "the engine was restarted"
    status = running.status()
    assert {node["block"] for node in status["nodes"]} == blocks
    assert next(model for model in status["models"] if model["id"] == "a")["pinned"], "the pin was forgotten"
    # the block can still be given back
    with running.client() as client:
        client.post("/gateway/v1/models/unload", json={"model": "a"}).raise_for_status()
    with running.client() as client:
        for model in ("slow", "poisoned"):
            client.post("/gateway/v1/models/unload", json={"model": model}).raise_for_status()
    wait_for(lambda: not running.engine_pids(), 30, "the engines are gone")
    wait_for(lambda: not running.status()["nodes"], IDLE_S + 30, "the agent is gone")
    wait_for(lambda: not named(running, str(running.layout.block_scripts)), 60, "the block is given back")
    # and one can be had again
    assert running.chat("a").status_code == 200


def kill_head(running: Gateway) -> None:
    """``kill -9`` of everything of the Ray head: GCS, raylet, autoscaler, Serve, controller, ingress. Not the block."""
    spared: set[int] = set()
    for script in named(running, str(running.layout.block_scripts)):
        spared |= {script.pid, *(child.pid for child in script.children(recursive=True))}
    spared |= set(running.engine_pids().values())
    head = [
        process
        for process in running.processes()
        if process.pid not in spared
        and not any(part in " ".join(arguments(process.pid)) for part in ("haproxy.cfg", "service.supervisor"))
    ]
    killed = [process.pid for process in head]
    for process in head:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    assert killed
