from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.blocks.ledger import Block, BlockPhase, Job, Ledger, LedgerState, pruned
from gateway_plugin.errors import ServiceError
from gateway_plugin.state_file import state_text

jobs = st.builds(Job, id=st.text(min_size=1), pid=st.none() | st.integers(1), started=st.none() | st.floats(0, 1e10))
blocks = st.builds(
    Block,
    name=st.text(min_size=1),
    type=st.text(min_size=1),
    phase=st.sampled_from(BlockPhase),
    asked_at=st.floats(0, 1e10),
    job=st.none() | jobs,
    tags=st.dictionaries(st.text(), st.text(), max_size=3),
)


@given(st.lists(blocks, max_size=5))
def test_what_is_written_is_read(written: list[Block]) -> None:
    assert LedgerState.model_validate_json(state_text(LedgerState(blocks=tuple(written)))).blocks == tuple(written)


def test_a_missing_ledger_is_empty_and_a_broken_one_is_never_taken_for_empty(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    assert ledger.read() == {}
    for broken in ("", "{", "[]", '{"version": 1, "blocks": 7}', '{"version": 1, "blocks": [{"name": "x"}]}'):
        ledger.path.write_text(broken)
        with pytest.raises(ServiceError, match=r"ledger\.json is garbled"):
            ledger.read()


def test_it_is_private_and_forgets_only_old_ends(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    many = {
        f"e{n}": Block(name=f"e{n}", type="a", phase=BlockPhase.COMPLETED, asked_at=0.0, ended_at=float(n))
        for n in range(60)
    }
    many["held"] = Block(name="held", type="a", phase=BlockPhase.RUNNING, asked_at=0.0)
    ledger.write(many)
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    kept = ledger.read()
    assert set(kept) == {"held", *(f"e{n}" for n in range(10, 60))}
    assert kept == pruned(many)


def test_a_flapping_type_does_not_push_out_what_others_did() -> None:
    many = {f"e{n}": Block(f"e{n}", "a", BlockPhase.FAILED, 0.0, ended_at=100.0 + n) for n in range(60)}
    others = {f"b{n}": Block(f"b{n}", "b", BlockPhase.FAILED, 0.0, ended_at=float(n)) for n in range(3)}
    assert set(others) <= set(pruned({**many, **others}))
