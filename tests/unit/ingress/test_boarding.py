"""What the shell round the trials tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.ingress.boarding import Boarding
from serve.ingress.trials import Trials
from serve.ingress.waiting import History, Waiting
from tests.support.controllers import ScriptedController
from tests.support.inner_doors import NOT_ROUTED, answer, inner_door
from tests.unit.ingress.test_ingress import CHAT, Deadly, ingress


async def test_a_trial_lasts_longer_than_an_engine_may_hang_unless_that_is_hours() -> None:
    controller = ScriptedController()
    waiting = Waiting(controller, 10.0)
    boarding = Boarding(waiting)
    for hang_after_s, exclusive_s in ((0.0, 90.0), (300.0, 330.0), (600.0, 630.0), (86400.0, 630.0)):
        controller.hang_after_s = hang_after_s
        boarding.seat(await waiting.history("m"), "/v1/embeddings", b"{}")
        boarding.seat(History("m"), "/v1/embeddings", b"{}")  # the controller was away
        assert boarding._trials["m"].exclusive_s == exclusive_s


async def test_the_trials_hear_of_every_request_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    came_back, goes = Trials.came_back, Trials.goes

    def hear_back(trials: Trials, ticket: int, now: float) -> None:
        heard.append("came back")
        came_back(trials, ticket, now)

    def hear_go(trials: Trials, ticket: int) -> None:
        heard.append("goes")
        goes(trials, ticket)

    monkeypatch.setattr(Trials, "came_back", hear_back)
    monkeypatch.setattr(Trials, "goes", hear_go)
    async with inner_door(NOT_ROUTED, NOT_ROUTED, answer(200)) as door:
        async with ingress(tmp_path, ScriptedController(), door.path) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert heard == ["goes", "came back", "goes", "came back", "goes"]


async def test_no_engine_is_loaded_for_a_request_that_is_known_to_kill(tmp_path: Path) -> None:
    controller = Deadly()
    async with inner_door(NOT_ROUTED, NOT_ROUTED, answer(200)) as door:
        async with ingress(tmp_path, controller, door.path) as client:
            await client.post("/v1/chat/completions", json=CHAT)
            assert len(controller.asked) == 3
            for patience in ("600", "0"):
                headers = {"x-gateway-wait": patience}
                response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
                assert response.json()["error"]["code"] == "request_killed_engine"
                assert len(controller.asked) == 3
            response = await client.post("/v1/chat/completions", json=CHAT, headers={"x-gateway-model": "other"})
            assert response.status_code == 200, "what kills one model's engines may be right for another"
