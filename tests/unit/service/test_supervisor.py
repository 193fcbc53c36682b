"""What the supervisor does where somebody else has a port that it is about to give to Ray."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway_plugin.paths import Layout
from gateway_plugin.processes import mark
from gateway_plugin.service import probes, ray_head
from gateway_plugin.service import supervisor as supervisor_module
from gateway_plugin.service.deployment import record_of
from gateway_plugin.service.restart_policy import Action, Part, PartName, Phase, Plan, decide
from gateway_plugin.service.supervisor import Supervisor
from gateway_plugin.service_state import write_record
from gateway_plugin.site import load_site
from tests.support.clusters import wait_for, write_local_site
from tests.support.disks import full_disk
from tests.support.stranger import UID, needs_root, squatting


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.make()
    reference = str(write_local_site(tmp_path / "site.py"))
    write_record(layout, record_of(load_site(reference), reference, tmp_path / "models.yaml", "127.0.0.1"))
    supervisor = Supervisor(layout)
    yield supervisor
    supervisor._pool.shutdown()


def test_a_head_is_not_started_where_its_port_is_taken_and_the_holder_is_told(made: Supervisor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", made._record.ray_port))
        taken.listen()
        plan = Plan()
        for _ in range(4):  # what 'up' gives up after
            plan, _ = decide(plan, made._look(plan, 0.0), plan.head.retry_at)
            plan = made._perform(Action.START_HEAD, plan, plan.head.since)
        assert plan.head.deaths == 4
        assert plan.head.error.startswith(f"port {made._record.ray_port} (Ray): in use by pid {os.getpid()} of user ")
        assert not made._children


@pytest.mark.process
@needs_root
def test_a_port_that_another_user_took_meanwhile_ends_the_start_with_that_users_name(made: Supervisor) -> None:
    port = made._record.ray_port
    with squatting([port]) as stranger:
        wait_for(lambda: stranger.events("bound", port), "the stranger", 10)
        starting = Plan(head=Part(phase=Phase.STARTING, mark=mark(os.getpid()), since=time.time()))
        wait_for(lambda: made._look(starting, time.time()).head_end, "the holder", 10)
        plan, actions = decide(starting, made._look(starting, time.time()), time.time())
        assert actions[-1] is Action.END_HEAD
        holder = f"in use by pid {stranger.child.pid} of user nobody (uid {UID})"
        assert plan.head.error == f"port {port} (Ray): {holder}"


@pytest.mark.parametrize(("own", "expected"), [(0, 5), (5, 5), (12, 12)])
@pytest.mark.parametrize("refused", [None, PermissionError, ProcessLookupError])
def test_the_head_is_never_less_nice_than_the_supervisor_and_starts_whatever_becomes_of_it(
    made: Supervisor, monkeypatch: pytest.MonkeyPatch, own: int, expected: int, refused: type[OSError] | None
) -> None:
    asked: list[tuple[int, int]] = []

    def set_priority(_which: int, who: int, niceness: int) -> None:
        asked.append((who, niceness))
        if refused is not None:
            raise refused

    child = SimpleNamespace(pid=os.getpid())
    monkeypatch.setattr(os, "getpriority", lambda _which, _who: own)
    monkeypatch.setattr(os, "setpriority", set_priority)
    for name in ("prepare", "head_argv", "head_env"):
        monkeypatch.setattr(ray_head, name, lambda *_: {})
    monkeypatch.setattr(Supervisor, "_spawn", lambda *_: child)
    plan = made._perform(Action.START_HEAD, Plan(), 0.0)
    assert plan.head.error == ""
    assert asked == [(os.getpid(), expected)]
    assert plan.head.error == ""
    assert made._children == {PartName.HEAD: child}


def test_whatever_goes_wrong_with_the_drain_everything_is_ended(
    made: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(supervisor_module, "drain_as_asked", broken)
    monkeypatch.setattr(supervisor_module, "end_everything", lambda *_, **__: ("what was looked for",))
    assert made._end() == 1


def test_our_own_listener_is_no_stranger(made: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "connects", lambda *_: True)
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", made._record.ray_port))
        ours.listen()
        assert probes.probe(made._layout, made._record, mark(os.getpid()), starting=True).port_lost == ""


@pytest.mark.parametrize("found", ["", "{", None])
def test_a_lost_record_is_written_again_as_soon_as_there_is_room(made: Supervisor, found: str | None) -> None:
    path = made._layout.service_json
    before = path.read_text()
    for looked in (False, True):
        if looked:
            made._mend_record()
        path.unlink() if found is None else path.write_text(found)
        with full_disk():
            for _ in range(2):
                made._mend_record()
                assert (path.read_text() if path.exists() else None) == found
        made._mend_record()
        assert path.read_text() == before
