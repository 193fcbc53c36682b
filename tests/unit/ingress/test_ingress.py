"""The ingress's own behaviour: who may ask it, what it refuses, how it waits and goes back through the edge."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError
from starlette.types import Receive, Scope, Send

from gateway_plugin.api_types import parse_model, parse_models
from gateway_plugin.errors import (
    DeadlineTooEarly,
    GatewayError,
    ModelNotFound,
    ModelQueueFull,
    ModelUnavailable,
    ServiceError,
    WaitDeadline,
)
from gateway_plugin.passing import FORMS, INFERENCE
from gateway_plugin.paths import Layout
from gateway_plugin.site import Limits
from serve.core.events import Priority, Requester
from serve.ingress import boarding, inference
from serve.ingress.body import Turns
from serve.ingress.desk import Desk
from serve.ingress.http import Ingress
from serve.ingress.relay import Relay
from serve.ingress.trials import Trials
from serve.ingress.waiting import UNATTENDED_MAX, UNATTENDED_PER_KEY, UNATTENDED_S
from tests.support.controllers import ScriptedController
from tests.support.inner_doors import CUT, NOT_ROUTED, answer, inner_door

SECRET = "the-edge-knows"
CHAT = {"model": "m", "messages": []}


@asynccontextmanager
async def ingress(
    tmp_path: Path,
    controller: ScriptedController,
    door: Path | None = None,
    limits: Limits | None = None,
    **headers: str,
) -> AsyncIterator[httpx.AsyncClient]:
    """Ingress and desk, with the edge's choice between them."""
    layout = Layout(tmp_path)
    for folder in (layout.tls, layout.logs):
        folder.mkdir(parents=True, exist_ok=True)
    layout.edge_secret.write_text(SECRET + "\n")
    made = Ingress(str(tmp_path), limits or Limits(), controller)
    if door is not None:
        made._inference._relay = Relay(door)
    inferring, desk = made.application(), Desk(str(tmp_path), limits or Limits(), controller).application()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (inferring if scope["path"] in INFERENCE else desk)(scope, receive, send)

    shown = {"x-gateway-edge": SECRET, "x-gateway-role": "user", **{k.replace("_", "-"): v for k, v in headers.items()}}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress", headers=shown) as client:
        yield client
    await made._inference._relay.close()


async def test_answers_only_what_carries_the_edges_secret(tmp_path: Path) -> None:
    controller = ScriptedController(models=[])
    async with ingress(tmp_path, controller) as client:
        for wrong in ("", "the-edge-know", SECRET + "x"):
            response = await client.get("/v1/models", headers={"x-gateway-edge": wrong})
            assert response.status_code == 403
        assert controller.told == []
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(("query", "ended"), [("", False), ("?all=0", False), ("?all=1", True), ("?all=true", True)])
async def test_blocks_that_ended_are_listed_where_asked_for(tmp_path: Path, query: str, ended: bool) -> None:
    controller = ScriptedController(blocks=[{"name": "b"}])
    async with ingress(tmp_path, controller, x_gateway_role="admin") as client:
        response = await client.get(f"/gateway/v1/blocks{query}")
    assert response.json() == {"blocks": [{"name": "b"}]}
    assert controller.told == [("blocks", (ended,))]


@pytest.mark.parametrize("verb", ["drain", "cancel"])
async def test_a_block_is_drained_and_cancelled_by_administrators(tmp_path: Path, verb: str) -> None:
    path = f"/gateway/v1/blocks/{verb}"
    controller = ScriptedController(**{f"{verb}_block": None})
    async with ingress(tmp_path, controller) as client:
        assert (await client.post(path, json={"block": "b"})).status_code == 403
        wrongs: tuple[object, ...] = ({}, {"block": 5}, {"block": ""}, [])
        for wrong in wrongs:
            response = await client.post(path, json=wrong, headers={"x-gateway-role": "admin"})
            assert response.status_code == 400
        assert controller.told == []
        response = await client.post(path, json={"block": "b"}, headers={"x-gateway-role": "admin"})
    assert response.status_code == 200
    assert controller.told == [(f"{verb}_block", ("b",))]


@pytest.mark.parametrize("path", ["/gateway/v1/status", "/gateway/v1/blocks", "/metrics"])
async def test_administration_needs_the_admin_role(tmp_path: Path, path: str) -> None:
    controller = ScriptedController(status={}, blocks=[], metrics=b"")
    async with ingress(tmp_path, controller) as client:
        assert (await client.get(path)).status_code == 403
        assert (await client.get(path, headers={"x-gateway-role": "admin"})).status_code == 200


async def test_administrators_ask_why_by_any_of_a_models_names(tmp_path: Path) -> None:
    admin = {"x-gateway-role": "admin"}
    controller = ScriptedController(why={"model": "Qwen/Qwen3-8B"})
    async with ingress(tmp_path, controller) as client:
        path = "/gateway/v1/models/why?model=Qwen%2FQwen3-8B"
        assert (await client.get(path)).status_code == 403
        assert (await client.get("/gateway/v1/models/why", headers=admin)).status_code == 400
        assert controller.told == []
        assert (await client.get(path, headers=admin)).json() == {"model": "Qwen/Qwen3-8B"}
        assert controller.told == [("why", ("Qwen/Qwen3-8B",))]
    async with ingress(tmp_path, ScriptedController(why=ModelNotFound("x"))) as client:
        response = await client.get("/gateway/v1/models/why?model=x", headers=admin)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"not json", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b'{"model": "' + b"m" * 2000 + b'"}', "not a name"),
        (b'{"model": [[[[["m"]]]]]}', "not a name"),
        (json.dumps({**CHAT, "user": "gl\xe4cier"}, ensure_ascii=False).encode("latin-1"), "not text in UTF-8"),
        (b'{"model": "m", "user": "' + b"x" * (1 << 20) + b'\xe4"}', "near byte 1048600"),
        (b'{"model": "m", "user": "\xc3', "not valid JSON"),
        (json.dumps(CHAT).encode("utf-16"), "not valid JSON in UTF-8: it is in UTF-16"),
        (gzip.compress(json.dumps(CHAT).encode(), mtime=0), "not valid JSON in UTF-8: it is compressed"),
        (b"{}", "has no 'model'"),
        (b'{"model": 5}', "not a name"),
        (b'{"model": "a;set server slot1/e1 weight 7"}', "not a name"),
    ],
)
async def test_a_bad_body_is_refused_before_anybody_waits(tmp_path: Path, body: bytes, says: str) -> None:
    controller = ScriptedController()
    async with ingress(tmp_path, controller) as client:
        response = await client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert controller.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[" * 5_000 + b"]" * 5_000,
        b'{"model": ' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"model": "\\ud800"}',
        b'{"model": "a", "\\udfff": 1}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": NaN}',
        b'{"model": ' + b"9" * 5_000 + b"}",
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize(
    "path",
    ["/gateway/v1/models/load", "/gateway/v1/models/apply", "/gateway/v1/blocks/drain", "/gateway/v1/blocks/retry"],
)
async def test_an_administrators_bad_json_is_refused_and_goes_no_further(
    tmp_path: Path, path: str, body: bytes
) -> None:
    controller = ScriptedController(administer=None, apply=None, drain_block=None, retry_blocks=None)
    async with ingress(tmp_path, controller, x_gateway_role="admin") as client:
        response = await client.post(path, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"
    assert controller.told == []


async def test_an_administrators_body_is_bounded(tmp_path: Path) -> None:
    async with ingress(tmp_path, ScriptedController(), x_gateway_role="admin") as client:
        response = await client.post("/gateway/v1/models/apply", content=b'{"models": "' + b"x" * (1 << 20) + b'"}')
    assert response.status_code == 413


@pytest.mark.parametrize("ready", [True, False])
async def test_readiness_and_the_edges_check_follow_the_controller(tmp_path: Path, ready: bool) -> None:
    said = {"ready": ready, "trouble": "the disk is full"}
    controller = ScriptedController(ready=said)
    async with ingress(tmp_path, controller) as client:
        found = await client.get("/ready")
    assert (found.status_code, found.json()) == (200 if ready else 503, said)
    made = Ingress(str(tmp_path), Limits(), controller)
    transport = httpx.ASGITransport(app=made.application())
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as edge:
        checked = await edge.get("/check", headers={"x-gateway-edge": SECRET})
    await made._inference._relay.close()
    assert checked.status_code == found.status_code


@pytest.mark.parametrize("part", [Ingress, Desk])
def test_nothing_is_served_where_the_edges_secret_is_empty(tmp_path: Path, part: type[Ingress | Desk]) -> None:
    layout = Layout(tmp_path)
    for folder in (layout.tls, layout.logs):
        folder.mkdir(parents=True)
    layout.edge_secret.write_text("\n")
    with pytest.raises(ServiceError, match="is empty"):
        part(str(tmp_path), Limits(), ScriptedController())


async def test_a_large_intricate_body_does_not_hold_up_others(tmp_path: Path) -> None:
    """One user's 8 MiB of brackets, four at a time; ``/ready`` is what Serve's and the edge's life hangs on."""
    body = b'{"a":[' + b"{}," * (8 * 2**20 // 3) + b'{}],"model":"m"}'
    controller = ScriptedController(ready={"ready": True})
    lags: list[float] = []

    async def tick() -> None:
        while True:
            begin = time.thread_time()
            await asyncio.sleep(0)
            lags.append(time.thread_time() - begin)

    turns = Turns()
    ticking = asyncio.create_task(tick())
    asks = await asyncio.gather(*(turns.read_ask(body, None) for _ in range(4)))
    ticking.cancel()
    assert [ask.model for ask in asks] == ["m"] * 4
    assert len(lags) > 50, "others had their turn"
    assert sorted(lags)[-3] < 0.1, "a slice takes some 10 ms of processor time, reading at one go a second"
    async with inner_door(answer(200)) as door, ingress(tmp_path, controller, door.path) as client:
        assert (await client.post("/v1/chat/completions", content=body)).status_code == 200


async def test_a_body_over_the_limit_is_refused_with_the_limit(tmp_path: Path) -> None:
    async with ingress(tmp_path, ScriptedController(), limits=Limits(body_bytes=2048)) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "pad": "x" * 4096})
    assert response.status_code == 413
    assert "2048 bytes" in response.json()["error"]["message"]


async def test_waits_then_goes_back_through_the_edge_with_the_model_named(tmp_path: Path) -> None:
    controller = ScriptedController()
    async with inner_door(answer(200, b'{"id": 1}', "x-engine: e")) as door:
        async with ingress(
            tmp_path, controller, door.path, x_gateway_role="user", x_gateway_request="r1", x_gateway_tag="0123",
            x_gateway_priority="batch",
        ) as client:  # fmt: skip
            response = await client.post("/v1/chat/completions?a=1", json=CHAT)
    assert response.status_code == 200
    assert response.json() == {"id": 1}
    assert response.headers["x-engine"] == "e"
    assert response.headers["content-length"] == "9", "for clients of HTTP/1.0, who know no chunks"
    assert controller.asked == [("m", False)]
    head, _, body = door.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions?a=1 ")
    assert b"x-gateway-model: m" in head
    assert b"x-gateway-request: r1" in head
    assert b"x-gateway-tag: 0123" in head
    assert b"x-gateway-priority: batch" in head
    assert SECRET.encode() not in head
    assert b"x-gateway-role" not in head
    assert json.loads(body) == CHAT


async def test_a_form_goes_on_byte_for_byte_with_its_content_type_and_the_model_named(tmp_path: Path) -> None:
    controller = ScriptedController()
    request = httpx.Request("POST", "http://x", files={"file": ("a", b"\0\r\n--\xff" * 40_000), "model": (None, "m")})
    form, content_type = request.read(), request.headers["content-type"]
    async with inner_door(answer(200, b'{"text": "x"}')) as door, ingress(tmp_path, controller, door.path) as client:
        for path in FORMS:
            answered = await client.post(path, content=form, headers={"content-type": content_type})
            assert (answered.status_code, answered.headers["x-gateway-found-model"]) == (200, "m")
    assert controller.asked == [("m", False)] * len(FORMS)
    for path, sent in zip(FORMS, door.requests, strict=True):
        head, _, body = sent.partition(b"\r\n\r\n")
        assert head.startswith(f"POST {path} ".encode())
        assert f"content-type: {content_type}".encode() in head
        assert b"x-gateway-model: m" in head
        assert body == form


async def test_a_form_is_held_within_its_keys_share_and_the_limit_of_a_body(tmp_path: Path) -> None:
    form: dict[str, Any] = {"data": {"model": "m"}, "files": {"file": ("a", b"x" * 4096)}}
    for limits, status in ((Limits(held_bytes_per_key=2048), 429), (Limits(body_bytes=2048), 413)):
        controller = ScriptedController()
        async with ingress(tmp_path, controller, limits=limits) as client:
            assert (await client.post("/v1/audio/transcriptions", **form)).status_code == status
        assert controller.asked == []


async def test_an_engines_error_is_passed_on_as_it_is(tmp_path: Path) -> None:
    async with inner_door(answer(422, b'{"error": "engine says no"}')) as door:
        async with ingress(tmp_path, ScriptedController(), door.path) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.content) == (422, b'{"error": "engine says no"}')


async def test_a_stamped_request_is_answered_at_once_and_never_waits(tmp_path: Path) -> None:
    controller = ScriptedController()
    async with ingress(tmp_path, controller) as client:
        response = await client.post("/v1/chat/completions", json=CHAT, headers={"x-gateway-stamp": "1"})
    assert response.status_code == 503
    assert response.headers["x-gateway-not-routed"] == "1"
    assert controller.asked == []


async def test_not_routed_is_news_for_the_controller_and_tried_again(tmp_path: Path) -> None:
    controller = ScriptedController()
    async with inner_door(NOT_ROUTED, NOT_ROUTED, answer(200)) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    assert controller.asked == [("m", False), ("m", True), ("m", True)]


async def test_not_routed_again_and_again_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BACK_OFF_S", 0.001)
    controller = ScriptedController()
    async with inner_door(NOT_ROUTED) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_routed"
    assert len(door.requests) == 4
    assert "retry-after" in response.headers


class Deadly(ScriptedController):
    """An engine died a while ago, and one dies under every request that is not routed."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths = [time.time() - 30]
        self.apart_since = time.time() - 20

    async def _acquire(
        self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
    ) -> GatewayError | None:
        if not_routed:
            self.deaths.append(time.time())
        return await super()._acquire(ticket, model, wait_s, not_routed)


async def test_a_request_that_was_alone_on_two_dying_engines_is_refused_and_remembered(tmp_path: Path) -> None:
    controller = Deadly()
    async with inner_door(NOT_ROUTED, NOT_ROUTED, answer(200)) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "request_killed_engine"
            assert response.headers["x-should-retry"] == "false"
            again = await client.post("/v1/chat/completions", json=CHAT)
            assert again.json()["error"]["code"] == "request_killed_engine"
            assert len(door.requests) == 2, "the second time it was sent to no engine"
            other = await client.post("/v1/chat/completions", json={**CHAT, "messages": [1]})
    assert other.status_code == 200
    assert ("answered", ("m",)) in controller.told


async def test_requests_that_died_together_are_tried_apart_and_answered(tmp_path: Path) -> None:
    now = time.time()
    controller = ScriptedController()
    controller.deaths = [now + 0.01]
    async with inner_door() as door:
        async with ingress(tmp_path, controller, door.path, x_gateway_arrived=str(int(now * 1000))) as client:
            asked = (client.post("/v1/chat/completions", json={**CHAT, "messages": [n]}) for n in range(9))
            answers = await asyncio.gather(*asked)
    assert [one.status_code for one in answers] == [200] * 9


async def test_an_innocent_whose_turn_does_not_come_is_told_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    controller = ScriptedController()
    controller.deaths = [now + 0.01]
    monkeypatch.setattr(Trials, "admit", lambda self, now: ())
    async with inner_door() as door:
        arrived = str(int(now * 1000))
        async with ingress(tmp_path, controller, door.path, x_gateway_arrived=arrived, x_gateway_wait="0") as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.json()["error"]["code"] == "wait_deadline"
    assert "hange" not in response.json()["error"]["message"]


async def test_a_stream_that_kills_its_engine_is_known_when_it_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boarding, "DEATH_NEWS_S", 0.05)
    controller = ScriptedController()
    controller.deaths = [time.time() - 30]
    controller.apart_since = time.time() - 20
    async with inner_door(CUT) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            for _ in range(2):
                with pytest.raises(inference.StreamBroken):
                    await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
                controller.deaths.append(time.time())
                await asyncio.sleep(0.2)
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.json()["error"]["code"] == "request_killed_engine"


async def test_the_controller_hears_again_and_again_of_suspects_and_no_more_when_they_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boarding, "KEEP_S", 0.05)
    now = time.time()
    controller = ScriptedController()
    controller.deaths = [now + 0.01]
    release = asyncio.Event()
    turn = boarding.Seat.turn

    async def held(seat: boarding.Seat, deadline: float) -> None:
        await release.wait()
        await turn(seat, deadline)

    monkeypatch.setattr(boarding.Seat, "turn", held)

    def told() -> int:
        return controller.told.count(("suspects", ("m",)))

    async with inner_door() as door:
        async with ingress(tmp_path, controller, door.path, x_gateway_arrived=str(int(now * 1000))) as client:
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            async with asyncio.timeout(5):
                while told() < 3:
                    await asyncio.sleep(0.01)
            release.set()
            assert (await asked).status_code == 200
            await asyncio.sleep(0.2)
            before = told()
            await asyncio.sleep(0.2)
    assert told() == before


async def test_who_came_here_first_is_not_blamed_for_a_death_unless_it_went_round(tmp_path: Path) -> None:
    now = time.time()
    for around, suspected in (("", False), ("1", True)):
        controller = ScriptedController()
        controller.apart_since = now - 10
        controller.deaths = [now + 0.01]
        async with inner_door() as door:
            arrived = str(int(now * 1000))
            async with ingress(tmp_path, controller, door.path, x_gateway_arrived=arrived) as client:
                headers = {"x-gateway-around": around} if around else {}
                response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
                assert response.status_code == 200
        assert (("suspects", ("m",)) in controller.told) == suspected


async def test_deaths_before_the_request_came_are_not_its_fault(tmp_path: Path) -> None:
    controller = ScriptedController()
    controller.deaths = [time.time() - 100, time.time() - 50]
    async with inner_door(NOT_ROUTED, answer(200)) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_controller_that_restarts_is_asked_again(tmp_path: Path) -> None:
    controller = ScriptedController(ActorDiedError, ActorDiedError, None)
    async with inner_door() as door:
        async with ingress(tmp_path, controller, door.path) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert len(controller.asked) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelQueueFull("m", 3), "model_queue_full"),
        (ModelUnavailable("no CUDA", retry_after_s=30, state="failed", eta_s=30.0), "model_unavailable"),
    ],
)
async def test_a_refusal_carries_code_state_eta_and_retry_after(
    tmp_path: Path, error: ModelUnavailable, code: str
) -> None:
    async with ingress(tmp_path, ScriptedController(error)) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    body = response.json()["error"]
    assert response.status_code == 503
    assert body["code"] == code
    assert {"state", "eta_s", "message", "type"} <= set(body)
    assert int(response.headers["retry-after"]) >= 1


async def test_a_client_that_does_not_wait_is_told_at_once_and_the_model_is_loaded_for_it(tmp_path: Path) -> None:
    waits: list[float] = []

    class Cold(ScriptedController):
        async def _acquire(
            self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
        ) -> GatewayError | None:
            waits.append(round(wait_s))
            if wait_s:
                await asyncio.sleep(60)
            return WaitDeadline("not ready", state="loading", eta_s=12.0)

    async with ingress(tmp_path, Cold(), x_gateway_wait="0") as client:
        for _ in range(2):
            response = await client.post("/v1/chat/completions", json=CHAT)
            assert response.status_code == 503
            assert response.json()["error"]["state"] == "loading"
            assert response.json()["error"]["eta_s"] == 12.0
    assert sorted(waits) == [0, 0, UNATTENDED_S], "one wait in the clients' stead, for both"


async def test_few_models_at_a_time_are_loaded_for_clients_that_do_not_wait(tmp_path: Path) -> None:
    loading: list[str] = []

    class Cold(ScriptedController):
        async def _acquire(
            self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
        ) -> GatewayError | None:
            if unattended:
                loading.append(model)
                await asyncio.sleep(60)
            return WaitDeadline("not ready", state="cold", eta_s=12.0)

    async with ingress(tmp_path, Cold(), x_gateway_wait="0") as client:
        for tag in range(2 * UNATTENDED_MAX):
            for number in range(5):
                body = {**CHAT, "model": f"m{tag}-{number}"}
                response = await client.post("/v1/chat/completions", json=body, headers={"x-gateway-tag": str(tag)})
                assert response.status_code == 503
    assert UNATTENDED_PER_KEY < UNATTENDED_MAX, "one key leaves others some"
    tags = range(UNATTENDED_MAX // UNATTENDED_PER_KEY)
    assert loading == [f"m{tag}-{number}" for tag in tags for number in range(UNATTENDED_PER_KEY)]


async def test_a_client_waits_no_longer_than_it_is_ready_to(tmp_path: Path) -> None:
    controller = ScriptedController(WaitDeadline("not ready"))
    waits: list[float] = []
    acquire = controller._acquire

    async def noted(
        ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
    ) -> GatewayError | None:
        waits.append(wait_s)
        return await acquire(ticket, model, wait_s, not_routed)

    controller._acquire = noted  # type: ignore[method-assign]
    for said, at_most in (("7", 7.0), ("999999", 20.0), ("soon", 20.0)):
        async with ingress(tmp_path, controller, limits=Limits(wait_s=20.0), x_gateway_wait=said) as client:
            await client.post("/v1/chat/completions", json=CHAT)
        assert at_most - 1 < waits[-1] <= at_most
    assert len(waits) == 3, "nobody waits in its stead"


async def test_a_deadline_bounds_the_wait_and_is_the_controllers_to_judge(tmp_path: Path) -> None:
    controller = ScriptedController(WaitDeadline("not ready", position=3))
    async with ingress(tmp_path, controller, limits=Limits(wait_s=20.0)) as client:
        for headers, due_s in (
            ({"x-gateway-deadline-s": "7.5"}, 7.5),
            ({"x-gateway-deadline-s": "60"}, 60.0),
            ({"x-gateway-deadline-s": "60", "x-gateway-wait": "3"}, 60.0),
        ):
            response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert (response.status_code, response.headers["x-gateway-position"]) == (503, "3")
            assert controller.deadlines[-1] == pytest.approx(due_s, abs=1.0)
        for wrong in ("0", "-1", "soon", "1e3", "nan", "", "5, 6", "0.0"):
            headers = {"x-gateway-deadline-s": wrong}
            response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 400, wrong
        assert len(controller.asked) == 3
        await client.post("/v1/chat/completions", json=CHAT)
    assert controller.deadlines[-1] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_whose_deadline_cannot_be_met_is_loaded_for_when_it_is_asked_again(
    tmp_path: Path, stream: bool
) -> None:
    waits: list[tuple[int, bool]] = []

    class Cold(ScriptedController):
        async def _acquire(
            self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
        ) -> GatewayError | None:
            waits.append((round(wait_s), unattended))
            if unattended:
                await asyncio.sleep(60)
            return DeadlineTooEarly("too late", state="cold", eta_s=60.0, retry_after_s=60.0)

    async with ingress(tmp_path, Cold(), x_gateway_deadline_s="5") as client:
        for _ in range(2):
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert (response.status_code, response.headers["retry-after"]) == (503, "60")
            assert response.json()["error"]["code"] == "deadline_too_early"
            assert response.json()["error"]["eta_s"] == 60.0
    assert waits == [(5, False), (UNATTENDED_S, True), (5, False)]


async def test_a_slow_stream_gets_comments_then_the_engines_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)
    async with inner_door(answer(200, b"data: x\n\n")) as door:
        async with ingress(tmp_path, ScriptedController(0.2), door.path) as client:
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *comments, event, _, end = response.text.split("\n")
    assert set(comments) == {": m is loading, ready in about 12 s"}
    assert (event, end) == ("data: x", "")
    assert response.text.count("\n\n") == 1, "a comment ends no event: some clients take an empty one for JSON"


async def test_sound_that_is_streamed_after_a_wait_is_the_engines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)
    async with inner_door(answer(200, b"RIFF\x00\xff")) as door:
        async with ingress(tmp_path, ScriptedController(0.2), door.path) as client:
            response = await client.post("/v1/audio/speech", json={"model": "m", "input": "x", "stream": True})
    assert (response.status_code, response.content) == (200, b"RIFF\x00\xff")
    assert not response.headers.get("content-type", "").startswith("text/event-stream")


async def test_the_comments_say_what_a_queued_model_waits_for_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)
    controller = ScriptedController(0.2)
    controller.outlook_now = {"state": "queued", "eta_s": 47.2, "reason": "job 7 waits:\n\nResources"}
    async with inner_door(answer(200, b"data: x\n\n")) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.text.split("\n")[0] == ": m is queued: job 7 waits: Resources, ready in about 47 s"


async def test_the_comments_say_each_waiters_own_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)

    class Crowded(ScriptedController):
        async def _acquire(
            self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
        ) -> GatewayError | None:
            self.outlook_now["positions"][ticket] = 7 + len(self.outlook_now["positions"])
            return await super()._acquire(ticket, model, wait_s, not_routed, unattended)

    controller = Crowded(0.3)
    controller.outlook_now = {"state": "queued", "eta_s": 9.0, "reason": None, "positions": {}, "models_before": 1}
    async with inner_door(answer(200, b"data: x\n\n")) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            asked = (client.post("/v1/chat/completions", json={**CHAT, "stream": True}) for _ in range(2))
            said = sorted([response.text.split("\n")[0] for response in await asyncio.gather(*asked)])
    places = [f": m is queued, position {number}, 1 model before it, ready in about 9 s" for number in (7, 8)]
    assert said == places


@pytest.mark.parametrize(("role", "told"), [("user", False), ("endpoint", False), ("", False), ("admin", True)])
async def test_only_administrators_are_told_what_an_engine_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, told: bool
) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)
    failed = ModelUnavailable("It failed.", detail="RuntimeError: /scratch/eve")

    class Slow(ScriptedController):
        async def _acquire(
            self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
        ) -> ModelUnavailable:
            await asyncio.sleep(0.12)
            return failed

    controller = Slow(models=[{"id": "m", "aliases": []}])
    async with ingress(tmp_path, controller, x_gateway_role=role) as client:
        for stream in (False, True):
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert "It failed." in response.text
            assert ("/scratch/eve" in response.text) is told
        for path in ("/v1/models", "/v1/models/m"):
            await client.get(path)
    assert controller.told == [("models", (told,))] * 2


async def test_a_failure_after_the_200_is_an_sse_error_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)

    class Slow(ScriptedController):
        async def _acquire(
            self, ticket: str, model: str, wait_s: float, not_routed: bool, unattended: bool = False
        ) -> ModelUnavailable:
            await asyncio.sleep(0.12)
            return ModelUnavailable("out of memory")

    async with ingress(tmp_path, Slow()) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    comments, _, event = response.text.rstrip().partition("\nevent")
    event = "event" + event
    assert comments.startswith(": m is ")
    assert event.startswith("event: error\ndata: ")
    assert json.loads(event.split("data: ")[1])["error"]["code"] == "model_unavailable"


@pytest.mark.parametrize("said", [b'{"detail":"Not Found"}', b'{"error":"x"}', b"[1]", b"no JSON"])
def test_an_error_event_is_in_openais_form(said: bytes) -> None:
    data = inference.sse_error(said).split(b"data: ")[1]
    assert json.loads(data)["error"]["message"] == said.decode()


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"content-length: 1000000000\r\n\r\n" + b"x" * 200_000, id="endless"),
        pytest.param(b"content-length: 100\r\n\r\nout of mem", id="silent"),
    ],
)
async def test_an_engines_error_is_read_as_far_as_is_reasonable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(inference, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(inference, "_ERROR_S", 0.3)
    async with inner_door(b"HTTP/1.1 500 Internal Server Error\r\n" + said) as door:
        async with ingress(tmp_path, ScriptedController(0.2), door.path) as client:
            async with asyncio.timeout(10):
                response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    event = "event" + response.text.rstrip().partition("\nevent")[2]
    assert event.startswith("event: error\ndata: ")
    message = json.loads(event.split("data: ")[1])["error"]["message"]
    assert message in ("x" * 500, "out of mem")


async def test_a_stream_whose_engine_dies_breaks_off(tmp_path: Path) -> None:
    async with inner_door(CUT) as door:
        async with ingress(tmp_path, ScriptedController(), door.path) as client:
            with pytest.raises(inference.StreamBroken):
                await client.post("/v1/chat/completions", json={**CHAT, "stream": True})


async def test_a_client_that_leaves_cancels_its_wait(tmp_path: Path) -> None:
    controller = ScriptedController(60.0)
    async with ingress(tmp_path, controller) as client:
        request = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        async with asyncio.timeout(5):
            while not controller.asked:
                await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        async with asyncio.timeout(5):
            while not controller.responses[-1].cancelled:
                await asyncio.sleep(0)


async def test_a_controller_that_is_away_is_a_503_that_says_so(tmp_path: Path) -> None:
    async with ingress(tmp_path, ScriptedController(models=ActorDiedError)) as client:
        response = await client.get("/v1/models")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "controller_restarting"
    assert "retry-after" in response.headers


async def test_unknown_paths_and_methods_are_404_in_openais_form(tmp_path: Path) -> None:
    async with ingress(tmp_path, ScriptedController()) as client:
        for method, path in (("GET", "/collective_rpc"), ("DELETE", "/v1/models"), ("GET", "/v1/chat/completions")):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_a_model_is_listed_and_found_under_each_of_its_names(tmp_path: Path) -> None:
    models = [{"id": "a/b", "aliases": ["c"], "state": "cold"}, {"id": "d2", "aliases": []}]
    async with ingress(tmp_path, ScriptedController(models=models)) as client:
        listed = (await client.get("/v1/models")).json()
        assert [(card["id"], card["root"]) for card in listed["data"]] == [("a/b", "a/b"), ("c", "a/b"), ("d2", "d2")]
        assert [model.name for model in parse_models(listed)] == ["a/b", "d2"]
        assert (await client.get("/v1/models/a/b")).json()["id"] == "a/b"
        found = (await client.get("/v1/models/c")).json()
        assert (found["id"], found["root"], found["state"]) == ("c", "a/b", "cold")
        assert parse_model(found).name == "a/b"
        assert (await client.get("/v1/models/d")).status_code == 404


class _Upstream(httpx.Response):
    """Says whether it was given back."""

    def __init__(self) -> None:
        super().__init__(200, stream=httpx.ByteStream(b""))
        self.closed = 0

    async def aclose(self) -> None:
        self.closed += 1


async def test_an_abandoned_answer_is_given_back_and_an_abandoned_wait_is_ended() -> None:
    upstream = _Upstream()

    async def answered() -> httpx.Response:
        return upstream

    done = asyncio.create_task(answered())
    await done
    await inference.abandon(done)
    assert upstream.closed == 1

    waiting: asyncio.Task[httpx.Response] = asyncio.create_task(asyncio.sleep(60, upstream))
    await inference.abandon(waiting)
    assert waiting.cancelled()


async def test_a_stream_whose_client_left_before_the_first_byte_is_given_back() -> None:
    upstream = _Upstream()
    response = inference.ClosedAfter(upstream.aiter_raw(), upstream.aclose)

    async def gone(*_: object) -> None:
        raise ConnectionResetError

    async def disconnect() -> dict[str, str]:
        return {"type": "http.disconnect"}

    with contextlib.suppress(ConnectionResetError):
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, disconnect, gone)
    assert upstream.closed >= 1


async def test_nothing_is_added_to_what_the_caller_sent(tmp_path: Path) -> None:
    async with inner_door() as door:
        async with ingress(tmp_path, ScriptedController(), door.path) as client:
            for name in ("accept", "accept-encoding", "user-agent"):
                del client.headers[name]
            await client.post("/v1/chat/completions", json=CHAT)
    head = door.requests[0].partition(b"\r\n\r\n")[0].lower()
    for added in (b"accept:", b"accept-encoding:", b"user-agent:"):
        assert b"\r\n" + added not in head


async def test_the_controller_hears_on_whose_behalf_a_request_waits(tmp_path: Path) -> None:
    controller = ScriptedController(WaitDeadline("not ready"))
    async with ingress(tmp_path, controller, x_gateway_tag="0123", x_gateway_caller="4567") as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json=CHAT, headers={"x-gateway-priority": "batch"})
    assert controller.requesters == [
        Requester(key="0123", caller="4567", priority=priority) for priority in (Priority.INTERACTIVE, Priority.BATCH)
    ]
