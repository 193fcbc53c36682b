"""A ledger that cannot be understood: the jobs that live are found again, and nothing is taken for lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger, LedgerGarbled, LedgerState
from gateway_plugin.blocks.recovery import whole_ledger
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from tests.support.disks import full_disk

GARBLED = ("", "{", "[]", "7", "\x00\x01", '{"version": 1, "blocks": [{"name": "x"}]}', '{"blocks": [7]}')


class Found:
    """Jobs of which one is found, one is gone, and one cannot be asked for."""

    in_doubt_s = 30.0

    def find(self, name: str) -> Job | None:
        if name.endswith("3"):
            raise ServiceError("the scheduler does not answer")
        return Job("7") if name.endswith("1") else None


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    made = Layout(tmp_path / "state")
    made.make()
    return made


@pytest.mark.parametrize("garbled", GARBLED)
def test_jobs_are_found_by_their_files(layout: Layout, garbled: str) -> None:
    for name in ("gw-a-1", "gw-a-2", "gw-a-3", "gw-b-c-1", "gw-other-1"):
        (layout.block_scripts / f"{name}.170000.submit").touch()
    layout.ledger.write_text(garbled)
    jobs = {"a": Found(), "b-c": Found()}
    blocks = whole_ledger(layout, jobs).read()  # type: ignore[arg-type]
    assert {name: (block.type, block.phase, block.job) for name, block in blocks.items()} == {
        "gw-a-1": ("a", BlockPhase.PENDING, Job("7")),
        "gw-a-3": ("a", BlockPhase.SUBMITTING, None),
        "gw-b-c-1": ("b-c", BlockPhase.PENDING, Job("7")),
    }
    assert (layout.blocks / "ledger.json.garbled").read_text() == garbled


def test_on_a_full_disk_no_job_is_forgotten(layout: Layout) -> None:
    (layout.block_scripts / "gw-a-1.170000.submit").touch()
    layout.ledger.write_text("{")
    jobs = {"a": Found()}
    for _ in range(2):
        with full_disk(), pytest.raises(OSError, match="No space"):
            whole_ledger(layout, jobs)  # type: ignore[arg-type]
        with pytest.raises(LedgerGarbled):
            Ledger(layout.ledger).read()
    assert list(whole_ledger(layout, jobs).read()) == ["gw-a-1"]  # type: ignore[arg-type]


def test_a_ledger_of_any_version_is_read(layout: Layout) -> None:
    block = Block("gw-a-1", "a", BlockPhase.RUNNING, 1.0, Job("7"))
    document = LedgerState(blocks=(block,)).model_dump(mode="json")
    document["version"], document["later"] = 2, 1
    document["blocks"][0]["later"] = document["blocks"][0]["job"]["later"] = 1
    del document["blocks"][0]["tags"], document["blocks"][0]["ended_at"], document["blocks"][0]["job"]["boot"]
    layout.ledger.write_text(json.dumps(document))
    assert whole_ledger(layout, {}).read() == {"gw-a-1": block}
    assert Ledger(layout.ledger).read() == {"gw-a-1": block}
