"""A memory that was worked out and is too small is raised, with a line in the log, and by the next controller again."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from serve.controller.deployment import Controller
from serve.controller.model_cards import with_more_memory
from serve.core import events as ev
from serve.core.views.cards import Cards, after
from tests.support.fleets import a_kind, a_model, a_policy, begin


def test_it_is_raised_when_an_engine_is_ready_and_when_a_catalog_is_read(caplog: pytest.LogCaptureFixture) -> None:
    model = a_model("a", predicted_gib=4)
    story = begin(model, policy=a_policy(a_kind(host_gib=6)))
    story.ask("a")
    listed = after({}, story.fleet, ev.CatalogChanged((model,)), 100.0)
    ready = ev.EngineReady(story.engine("a").id, "h:1", 42.0, used_mib=4500)
    cards = after(listed, story.fleet, ready, 200.0)
    with caplog.at_level(logging.WARNING, "gateway.controller"):
        found = with_more_memory(story.fleet, ready, cards)
    assert found is not None
    assert [one.memory_gib for one in found.models] == [4.7]
    (line,) = caplog.records
    said = {key: vars(line)[key] for key in ("model", "predicted_gib", "memory_gib", "measured_mib")}
    assert said == {"model": "a", "predicted_gib": 4, "memory_gib": 4.7, "measured_mib": 4500}
    assert with_more_memory(story.fleet, found, cards) is None
    assert with_more_memory(story.fleet, ev.CatalogChanged((model,)), cards) == found, "by the next controller"
    assert with_more_memory(story.fleet, ev.Tick(), cards) is None
    enough: Cards = {"a": replace(cards["a"], used_mib=4000)}
    assert with_more_memory(story.fleet, ready, enough) is None


async def test_a_raise_does_not_undo_a_catalog_that_waits_in_the_mailbox(tmp_path: Path) -> None:
    model = a_model("a", predicted_gib=4)
    story = begin(model)
    story.ask("a")
    (tmp_path / "logs").mkdir()
    controller = Controller(str(tmp_path), story.fleet.policy, lambda *_: (object, ()))
    controller.fleet = story.fleet
    controller.post(ev.CatalogChanged((model,)))
    controller.post(ev.EngineReady(story.engine("a").id, "h:1", 42.0, used_mib=4500))
    controller.post(ev.CatalogChanged((a_model("a", 6), a_model("new"))))
    loop = asyncio.create_task(controller._run())
    async with asyncio.timeout(30):
        while "new" not in controller.fleet.models or not controller._mailbox.empty():
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)  # what it would raise now
    for task in (loop, *controller._tasks):
        task.cancel()
    assert controller.fleet.models.keys() == {"a", "new"}
    assert controller.fleet.models["a"].memory_gib == 6
