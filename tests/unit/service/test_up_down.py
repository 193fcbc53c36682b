"""``gateway up`` where a supervisor or an edge lives that it did not start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.edge.process import of_this_version, prepare
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, mark
from gateway_plugin.service import up_down as lifecycle
from gateway_plugin.service.deployment import record_of
from gateway_plugin.service.ray_head import head_address
from gateway_plugin.service.restart_policy import Part, Phase, Plan
from gateway_plugin.service.supervisor_state import supervisor_state
from gateway_plugin.service_state import ServiceRecord, write_record
from gateway_plugin.site import load_site
from gateway_plugin.state_file import state_text
from tests.support.clusters import write_local_site

pytestmark = pytest.mark.process

CATALOG = "models: {}\n"


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    (tmp_path / "models.yaml").write_text(CATALOG)
    return str(write_local_site(tmp_path / "site.py"))


@pytest.fixture
def layout(tmp_path: Path, reference: str) -> Layout:
    made = Layout(tmp_path / "state")
    made.make()
    return made


@pytest.fixture
def other() -> Iterator[Mark]:
    """A process that lives, and that nobody may end."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        known = mark(child.pid)
        assert known is not None
        yield known
        assert child.poll() is None
        child.kill()


def up(layout: Layout, reference: str) -> None:
    lifecycle.up(layout.state, reference, layout.state.parent / "models.yaml", timeout_s=1.0)


def recorded(layout: Layout, reference: str) -> None:
    site = load_site(reference)
    catalog = layout.state.parent / "models.yaml"
    write_record(layout, record_of(site, reference, catalog, head_address(site)))


def test_a_supervisor_whose_record_is_lost_is_named_and_lives_on(
    layout: Layout, reference: str, other: Mark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "supervisors_of", lambda _: (other,))
    with pytest.raises(ServiceError, match=rf"a supervisor runs \(PID {other.pid}\) and .*service.json"):
        up(layout, reference)


def test_what_up_takes_back_is_its_own_supervisor(
    layout: Layout, reference: str, other: Mark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "supervisors_of", lambda _: (other,))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as started:
        lifecycle._undo(layout, load_site(reference), started, everything=False)
        assert started.wait(5) != 0
    assert layout.run.is_dir()


@pytest.mark.parametrize("fault", [ServiceError("HAProxy rejects it"), OSError(28, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["provision", "wait_until_ready"])
def test_an_up_that_comes_to_nothing_leaves_no_process_and_no_run_folder(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch, step: str, fault: BaseException
) -> None:
    layout = Layout(tmp_path / "state")
    started: list[subprocess.Popen[bytes]] = []

    def start(_: Layout) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    def fail(*_: object, **__: object) -> None:
        layout.make()
        assert layout.run.is_dir()
        raise fault

    monkeypatch.setattr(lifecycle, "before_start", lambda *_: ())
    # In a test's folder paths may be too long for HAProxy.
    monkeypatch.setattr(lifecycle, "provision", lambda *_, **__: "")
    monkeypatch.setattr(lifecycle, "_start_supervisor", start)
    monkeypatch.setattr(lifecycle, step, fail)
    with pytest.raises(type(fault)):
        up(layout, reference)
    assert not layout.run.exists()
    assert [process.wait(5) != 0 for process in started] == [True] * (step == "wait_until_ready")


def test_an_up_that_cannot_end_what_it_started_leaves_its_records(
    layout: Layout, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "end_everything", lambda *_: ("edge (pid 7)",))
    lifecycle._undo(layout, load_site(reference), None, everything=True)
    assert layout.run.is_dir()


@pytest.mark.parametrize("ending", ["stopping", "gone"])
def test_up_during_a_drain_is_refused_at_once(
    layout: Layout, reference: str, other: Mark, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    recorded(layout, reference)
    looks = iter([(other,), (other,)])
    seen = (lambda _: (other,)) if ending == "stopping" else (lambda _: next(looks, ()))
    monkeypatch.setattr(lifecycle, "supervisors_of", seen)
    part = Part(Phase.RUNNING)
    stage = "stopping" if ending == "stopping" else "running"
    state = supervisor_state(Plan(part, part, part), stage, other, 0.0, ServiceRecord())
    layout.supervisor_status.write_text(state_text(state))
    with pytest.raises(ServiceError, match="the gateway is being ended"):
        up(layout, reference)


def test_an_edge_without_a_door_of_this_version_is_not_adopted(
    layout: Layout, reference: str, other: Mark, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(layout, load_site(reference))
    assert of_this_version(layout)
    configured = layout.edge_config.read_text()
    for door in (layout.owner_door, layout.ingress_socket):
        layout.edge_config.write_text(configured.replace(str(door), "127.0.0.1:8000"))
        assert not of_this_version(layout)
    layout.owner_door.touch()
    monkeypatch.setattr(lifecycle, "edges_of", lambda _: (other,))
    with pytest.raises(ServiceError, match="an edge of another version"):
        up(layout, reference)
