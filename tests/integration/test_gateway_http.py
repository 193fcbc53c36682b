"""The whole gateway over HTTP, cold and warm: what a client sees while models come and go."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from gateway_plugin import Client
from gateway_plugin.blocks.ray_tls import tls_environment
from gateway_plugin.edge.socket_protocol import ask
from gateway_plugin.service.discovery import heads_of
from tests.support.doors import CLOSED, MUTUAL_TLS, PLAIN_HTTP, door_at, doors_of
from tests.support.gateways import Gateway, chat_body, fake_model, gateway, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

WAITING_MAX = 30


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    with gateway(
        lambda memory: {
            "a": fake_model(memory, "--load-delay-s", "1", aliases=["first"]),
            "b": fake_model(memory, "--load-delay-s", "1"),
            "brief": fake_model(memory, memory_gib=0.1, keep_alive="1s"),
            "slow": fake_model(memory, "--load-delay-s", "12", memory_gib=0.1),
            "vectors": fake_model(memory, "--task", "embed", memory_gib=0.1, task="embed"),
            "small": fake_model(memory, memory_gib=0.01, predicted_gib=0.01),
        },
        limits={"waiting_requests": WAITING_MAX, "body_bytes": 200_000},
    ) as made:
        yield made


def model(running: Gateway, name: str) -> dict[str, object]:
    with running.client() as client:
        found: dict[str, object] = client.get(f"/v1/models/{name}").json()
    return found


def unload(running: Gateway, name: str) -> None:
    with running.client() as client:
        client.post("/gateway/v1/models/unload", json={"model": name}).raise_for_status()
    wait_for(lambda: model(running, name)["state"] == "cold", 30, f"{name} is cold")


def starts(running: Gateway, name: str) -> int:
    """How often an engine of the model was started, by the controller's own log."""
    lines = (running.layout.logs / "controller.log").read_text().splitlines()
    return sum(entry["message"] == "StartEngine" and entry["model"] == name for entry in map(json.loads, lines))


async def test_a_burst_on_a_cold_model_causes_one_load_and_all_are_answered(running: Gateway) -> None:
    before = starts(running, "a")
    async with running.async_client() as client:
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=chat_body("a" if n % 2 else "first")) for n in range(20))
        )
    assert Counter(answer.status_code for answer in answers) == {200: 20}
    assert starts(running, "a") == before + 1


async def test_one_more_than_may_wait_is_refused_and_told_when_to_come_back(running: Gateway) -> None:
    unload(running, "b")
    async with running.async_client() as client:
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=chat_body("b")) for _ in range(WAITING_MAX + 10))
        )
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) >= 1
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_queue_full")
        assert str(WAITING_MAX) in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1


def test_a_memory_that_was_worked_out_and_is_too_small_is_raised_while_its_engine_serves(running: Gateway) -> None:
    with running.client() as client:
        assert client.post("/v1/chat/completions", json=chat_body("small")).status_code == 200
    wait_for(lambda: model(running, "small")["memory_gib"] != 0.01, 10, "the memory of 'small' is raised")
    found = model(running, "small")
    assert (found["state"], found["predicted_gib"], starts(running, "small")) == ("ready", 0.01, 1)
    held, planned = float(str(found["measured_gib"])), float(str(found["memory_gib"]))
    assert 0 < held < planned
    lines = [json.loads(line) for line in (running.layout.logs / "controller.log").read_text().splitlines()]
    assert [line["model"] for line in lines if line["message"] == "memory-raised"] == ["small"]
    unload(running, "small")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (json.dumps(chat_body("nobody")), 404, "model_not_found"),
        ("{", 400, "invalid_request"),
        ("{}", 400, "invalid_request"),
        (json.dumps({"model": ["a"]}), 400, "invalid_request"),
        (json.dumps(chat_body("a", "x" * 300_000)), 413, "body_too_large"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(running: Gateway, body: str, status: int, code: str) -> None:
    with running.client() as client:
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_the_list_tells_since_when_and_how_long_a_context(running: Gateway) -> None:
    assert running.chat("a").status_code == 200
    with running.client() as client:
        card = client.get("/v1/models/a").json()
    assert card["max_model_len"] == 4096
    assert 0 < card["created"] <= time.time()


def test_a_users_key_serves_models_but_not_administration(running: Gateway) -> None:
    key = running.cli("keys", "create", "alice", "--json").stdout
    headers = {"authorization": f"Bearer {json.loads(key)['secret']}"}
    with running.client(headers=headers) as client:
        assert client.post("/v1/chat/completions", json=chat_body("brief")).status_code == 200
        assert client.get("/v1/models").status_code == 200
        for method, path in (("GET", "/gateway/v1/status"), ("POST", "/gateway/v1/models/unload"), ("GET", "/metrics")):
            assert client.request(method, path, json={"model": "a"} if method == "POST" else None).status_code == 403
        running.cli("keys", "revoke", "alice")
        assert client.get("/v1/models").status_code == 401


def test_a_request_that_waits_never_starts_once_its_key_is_revoked(running: Gateway) -> None:
    unload(running, "slow")
    secret = json.loads(running.cli("keys", "create", "bob", "--json").stdout)["secret"]
    ended: list[httpx.Response] = []

    def wait() -> None:
        with running.client(headers={"authorization": f"Bearer {secret}"}) as client:
            ended.append(client.post("/v1/chat/completions", json=chat_body("slow")))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: model(running, "slow")["waiting"] == 1, 10, "it waits")
    running.cli("keys", "revoke", "bob")
    thread.join(30)  # loaded, the model would have answered with 200
    assert [(one.status_code, one.json()["error"]["code"]) for one in ended] == [(502, "engine_broke_off")]
    found = wait_for(lambda: (now := model(running, "slow"))["waiting"] == 0 and now, 5, "nobody waits for it any more")
    assert found["state"] != "ready"


def test_an_edge_with_other_keys_than_the_store_is_put_right_by_the_supervisor(running: Gateway) -> None:
    path = running.layout.keys_map

    def names() -> set[str]:
        return set(ask(running.layout.edge_socket, f"show map {path}").split()[2::3])

    before = names()
    own = next(line.split()[0] for line in path.read_text().splitlines() if line.endswith("admin:admin-cli"))
    changed = f"add map {path} {'A' * 64} admin:ghost;del map {path} {own};show map {path}"
    assert "admin:ghost" in ask(running.layout.edge_socket, changed)  # in one go: the supervisor looks every second
    wait_for(lambda: names() == before, 5, "the edge has the store's keys")


def test_a_stream_is_the_same_cold_and_warm(running: Gateway) -> None:
    unload(running, "vectors")
    body = chat_body("a", "@tokens=5", stream=True)
    seen = []
    for cold in (True, False):
        if cold:
            unload(running, "a")
        with running.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            seen.append([line for line in response.iter_lines() if line.startswith("data:")])
    assert len(seen[0]) == len(seen[1])
    assert seen[0][-1] == seen[1][-1] == "data: [DONE]"


def test_a_stream_that_waits_long_is_kept_alive_with_comments(running: Gateway) -> None:
    assert running.chat("slow").status_code == 200, "from then on it is known how long a load takes"
    unload(running, "slow")
    with running.client() as client:
        hasty = client.post("/v1/chat/completions", json=chat_body("slow"), headers={"x-gateway-deadline-s": "2"})
        assert (hasty.status_code, hasty.json()["error"]["code"]) == (503, "deadline_too_early")
        assert int(hasty.headers["retry-after"]) >= 10
        assert hasty.headers["x-gateway-position"] == "1"
        with client.stream("POST", "/v1/chat/completions", json=chat_body("slow", stream=True)) as response:
            text = "".join(response.iter_text())
    first, rest = text.split("\n\n", 1)
    assert first.startswith(": slow is loading, position 1, ready in")
    assert rest.rstrip().endswith("data: [DONE]")


def test_a_load_that_nobody_waits_for_any_more_is_finished_for_who_comes_back(running: Gateway) -> None:
    unload(running, "slow")
    with running.client(), pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.url}/v1/chat/completions",
            json=chat_body("slow"),
            headers={"authorization": f"Bearer {running.key}"},
            timeout=2.0,
            verify=running.trust,
        )
    wait_for(lambda: running.status()["waiting"] == 0, 10, "nobody waits")
    wait_for(lambda: model(running, "slow")["state"] == "ready", 30, "the load is finished")


def test_keep_alive_unloads_an_idle_model_and_only_that(running: Gateway) -> None:
    assert running.chat("a").status_code == 200
    assert running.chat("brief").status_code == 200
    wait_for(lambda: model(running, "brief")["state"] == "cold", 15, "brief was unloaded")
    assert model(running, "a")["state"] == "ready"


def test_a_pinned_model_is_never_evicted_and_the_other_waits_until_it_is_unpinned(running: Gateway) -> None:
    assert running.chat("a").status_code == 200
    with running.client() as client:
        client.post("/gateway/v1/models/pin", json={"model": "a"}).raise_for_status()
        asked = threading.Thread(target=running.chat, args=("b",))
        asked.start()
        wait_for(lambda: model(running, "b")["waiting"] == 1, 10, "b is waited for")
        time.sleep(3)  # longer than an eviction takes; it must not happen
        assert model(running, "a")["state"] == "ready"
        assert "but for a (pinned)" in running.cli("models", "why", "b").stdout
        client.post("/gateway/v1/models/unpin", json={"model": "a"}).raise_for_status()
    asked.join(30)
    assert not asked.is_alive()
    assert model(running, "b")["state"] == "ready"
    with Client(running.url, running.key, ca=running.layout.ca) as told:
        last = told.why("first").decisions[0]
    assert (last["action"], last["model"]) == ("evict", "a")


def test_embeddings_and_the_client_library(running: Gateway) -> None:
    with Client(running.url, running.key, ca=running.layout.ca) as client:
        client.wait_until_ready("vectors", 60)
        vectors = client.openai.embeddings.create(model="vectors", input=["one", "two"]).data
        assert len(vectors) == 2
        assert {entry.name for entry in client.models()} == {"a", "b", "brief", "slow", "small", "vectors"}


def test_the_block_that_holds_the_models_is_listed_with_them(running: Gateway) -> None:
    assert running.chat("a").status_code == 200
    with running.client() as client:
        (row,) = client.get("/gateway/v1/blocks").json()["blocks"]
        metrics = client.get("/metrics").text
    kind, life, number = row["node"].split("-")
    assert (kind, int(life, 36), number) == ("local", running.status()["epoch"], "1")
    assert (row["type"], row["state"], row["phase"]) == ("local", "serving", "running")
    assert row["job"].isdigit()  # the PID of its shell
    assert "a" in [entry["model"] for entry in row["models"]]
    (counts,) = running.status()["types"]
    assert (counts["type"], counts["running"], counts["pending"], counts["max"]) == ("local", 1, 0, 1)
    assert 'gateway_blocks{phase="running",type="local"} 1.0' in metrics
    assert f"block {row['name']} on" in running.cli("blocks", "logs", row["name"], "-n", "1000").stdout


def test_metrics_and_the_usage_log_tell_what_happened(running: Gateway) -> None:
    with running.client() as client:
        ours = client.get("/metrics").text
        edges = client.get("/metrics/edge").text
    switches = running.status()["switches"]
    assert f"gateway_switches_total {float(switches)}" in ours
    assert 'gateway_load_seconds_count{model="a"}' in ours
    assert 'gateway_engines{state="ready"}' in ours
    assert f'gateway_decisions_total{{action="evict"}} {float(switches)}' in ours
    assert "haproxy_frontend_http_requests_total" in edges
    entries = [json.loads(line) for line in running.layout.usage_log.read_text().splitlines()]
    chats = [entry for entry in entries if entry["path"] == "/v1/chat/completions"]
    assert {"a", "b"} <= {entry["model"] for entry in chats}
    assert "xxxx" not in running.layout.usage_log.read_text()
    assert running.key not in running.layout.usage_log.read_text()
    trace = running.cli("usage", "export-trace", "--names").stdout.splitlines()
    assert len(trace) > len([entry for entry in chats if entry["status"] == 200])
    replayed = running.cli("controller", "replay", str(running.layout.controller / "events.jsonl"))
    assert "decided: evict a" in replayed.stdout


def test_the_desk_answers_nobody_but_the_edge(running: Gateway) -> None:
    transport = httpx.HTTPTransport(uds=str(running.layout.desk_socket))
    with httpx.Client(transport=transport, base_url="http://desk") as client:
        for headers in ({}, {"x-gateway-edge": "guess"}, {"x-gateway-role": "admin"}, running_key(running)):
            found = client.get("/gateway/v1/status", headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (403, "forbidden")


def running_key(running: Gateway) -> dict[str, str]:
    return {"authorization": f"Bearer {running.key}"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_reaches_no_socket_no_secret_and_no_engine(running: Gateway) -> None:
    assert running.chat("a").status_code == 200
    engine = next(engine["address"] for engine in running.status()["engines"] if engine["model"] == "a")
    tries = {
        "edge": f"connect(socket.AF_UNIX, {str(running.layout.edge_socket)!r})",
        "owner": f"connect(socket.AF_UNIX, {str(running.layout.owner_door)!r})",
        "inner": f"connect(socket.AF_UNIX, {str(running.layout.inner_door)!r})",
        "cold": f"connect(socket.AF_UNIX, {str(running.layout.cold_door)!r})",
        "secret": f"open({str(running.layout.edge_secret)!r})",
        "key": f"open({str(running.layout.admin_key)!r})",
        "token": f"open({str(running.layout.ray_token)!r})",
        "records": f"os.listdir({str(running.layout.engine_records)!r})",
        "engine": f"ask({engine!r})",
        "desk": f"connect(socket.AF_UNIX, {str(running.layout.desk_socket)!r})",
    }
    program = """
import encodings.idna, os, socket, ssl, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # here: the interpreter may lie where that user may not go
def connect(family, address):
    with socket.socket(family) as s: s.connect(address)
def ask(address):
    host, port = address.split(":")
    context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as s:
        s.sendall(b"GET /v1/models HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n")
        answer = s.recv(4096)
        assert not answer or b" 200 " in answer.split(b"\\r\\n")[0], "refused: " + repr(answer[:60])
        if not answer: raise ConnectionError("closed")
"""
    for name, attempt in tries.items():
        done = subprocess.run(
            [sys.executable, "-I", "-c", f"{program}\n{attempt}"],
            cwd="/", capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode != 0, f"another user got through: {name}"
        shut_out = r"PermissionError|ssl\.SSL|ConnectionError|ConnectionReset"
        assert re.search(shut_out, done.stderr), (name, done.stderr)


def test_ray_refuses_a_driver_without_the_token(running: Gateway) -> None:
    record = json.loads(running.layout.service_json.read_text())
    address = f"{record['head_address']}:{record['ray_port']}"
    environment = {**running.environment, **tls_environment(running.layout.ray_identity), "HOME": "/nonexistent"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    program = f"import ray; ray.init(address={address!r}, log_to_driver=False); print(len(ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "auth" in (done.stdout + done.stderr).lower()


def test_nothing_of_ray_that_listens_answers_without_certificate_or_token(running: Gateway) -> None:
    record = json.loads(running.layout.service_json.read_text())
    found: dict[str, list[str]] = {}
    (head,) = heads_of(running.layout)
    for process, bound, port in doors_of(psutil.Process(head.pid).children(recursive=True)):
        door = door_at(bound, port, record["head_address"], running.layout.ray_identity)
        if door != CLOSED:  # a worker of Ray's that ended meanwhile
            found.setdefault(door, []).append(process.strip())
    assert set(found) == {MUTUAL_TLS, PLAIN_HTTP}, found
    assert {process.split("Agent")[0] for process in found[PLAIN_HTTP]} == {"ray::Dashboard", "ray::RuntimeEnv"}
    assert any("ServeController" in process for process in found[MUTUAL_TLS]), found
    assert any("ServeReplica" in process for process in found[MUTUAL_TLS]), found


def test_a_catalog_applied_at_run_time_adds_and_removes(running: Gateway) -> None:
    document = json.loads(running.layout.catalog_json.read_text())
    document["models"]["late"] = fake_model(running.folder / "memory", memory_gib=0.1)
    del document["models"]["vectors"]
    with running.client() as client:
        client.post("/gateway/v1/models/apply", json=document).raise_for_status()
        assert client.post("/v1/chat/completions", json=chat_body("late")).status_code == 200
        assert client.post("/v1/embeddings", json={"model": "vectors", "input": "x"}).status_code == 404
        bad = client.post("/gateway/v1/models/apply", json={"models": {"x": {"sauce": 1}}})
        assert bad.status_code == 400
        assert "sauce" in bad.json()["error"]["message"]
