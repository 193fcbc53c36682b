"""The controller reads the pool's ledger: a real file, written by the real ``Ledger``."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger
from gateway_plugin.clock import SteadyClock
from gateway_plugin.paths import Layout
from serve.controller import blocks
from serve.controller.blocks import LedgerWatch, seen_block
from serve.core.events import Event, SeenBlock

BLOCK = Block(
    name="gw-a-1", type="a", phase=BlockPhase.PENDING, asked_at=5.0, job=Job("7", pid=9), reason="Resources",
    starts_at=50.0, ends_at=350.0,
)  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.blocks.mkdir()
    return layout


def test_a_block_is_told_as_the_ledger_has_it() -> None:
    told = SeenBlock("gw-a-1", "a", BlockPhase.PENDING, 5.0, job="7", reason="Resources", starts_at=50.0, ends_at=350.0)
    assert seen_block(BLOCK) == told
    ended = replace(BLOCK, node="n1").ending(BlockPhase.FAILED, 60.0, "exit code 3")
    assert (seen_block(ended).host, seen_block(ended).ended_at, seen_block(ended).reason) == ("n1", 60.0, "exit code 3")


def test_only_news_is_told(layout: Layout) -> None:
    watch, ledger = LedgerWatch(layout, print, SteadyClock()), Ledger(layout.ledger)
    assert watch.look() is None  # no ledger yet
    ledger.write({BLOCK.name: BLOCK})
    seen = watch.look()
    assert seen is not None
    assert [block.name for block in seen.blocks] == ["gw-a-1"]
    assert watch.look() is None  # the same file
    ledger.write({BLOCK.name: replace(BLOCK, tags={"ray": "up-to-date"})})
    assert watch.look() is None  # another file, which says nothing new
    ledger.write({BLOCK.name: replace(BLOCK, phase=BlockPhase.RUNNING)})
    again = watch.look()
    assert again is not None
    assert again.blocks[0].phase == "running"


def test_a_ledger_that_cannot_be_read_is_logged_once_and_read_when_it_can(
    layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    watch = LedgerWatch(layout, print, SteadyClock())
    layout.ledger.write_text("{")
    with caplog.at_level(logging.INFO, "gateway.controller"):
        assert [watch.look() for _ in range(3)] == [None, None, None]
    assert [record.message for record in caplog.records] == ["ledger-unreadable"]
    Ledger(layout.ledger).write({BLOCK.name: BLOCK})
    assert watch.look() is not None


async def test_it_goes_on_looking(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LOOK_S", 0.01)
    posted: asyncio.Queue[Event] = asyncio.Queue()
    watch = asyncio.create_task(LedgerWatch(layout, posted.put_nowait, SteadyClock()).watch())
    for phase in (BlockPhase.PENDING, BlockPhase.RUNNING):
        Ledger(layout.ledger).write({BLOCK.name: replace(BLOCK, phase=phase)})
        event = await asyncio.wait_for(posted.get(), 10)
        assert event.blocks[0].phase == phase.value  # type: ignore[union-attr]
    watch.cancel()
