"""What lives is found by its command line, whatever the notes say; another gateway's parts never are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway_plugin.paths import Layout
from gateway_plugin.processes import descendants, end, mark
from gateway_plugin.service import discovery
from gateway_plugin.service.discovery import (
    deployments_of,
    edges_of,
    has_application,
    has_parts,
    heads_of,
    parts_run,
    programs_below,
    supervisors_of,
)

pytestmark = pytest.mark.process

Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[subprocess.Popen[bytes]] = []

    def begin(*words: str) -> int:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
        children.append(child)
        while not Path(f"/proc/{child.pid}/cmdline").read_bytes():  # empty for a moment after exec
            assert child.poll() is None
        return child.pid

    yield begin
    for child in children:
        child.kill()
        child.wait()


HEAD = (
    "/venv/ray/core/src/ray/gcs/gcs_server", "/venv/ray/core/src/ray/raylet/raylet", "ray::ServeController.listen",
    "ray::ServeReplica:gateway:controller", "ray::ServeReplica:gateway:desk",
    "ray::ServeReplica:gateway:ingress",
)  # fmt: skip


def test_each_process_of_head_and_application_is_missed_when_it_is_gone() -> None:
    assert has_parts(HEAD)
    assert has_application(HEAD)
    for gone in HEAD:
        left = [program for program in HEAD if program != gone]
        assert has_parts(left) == gone.startswith("ray::")
        assert has_application(left) != gone.startswith("ray::")


@pytest.mark.parametrize("listed", [True, False])
def test_the_heads_parts_are_seen_also_where_the_kernel_lists_no_children(
    monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    scans: list[int] = []
    monkeypatch.setattr(discovery, "descendants", lambda pid: scans.append(pid) or descendants(pid))  # type: ignore[func-returns-value]
    if not listed:
        monkeypatch.setattr(discovery, "listed_children", lambda _: ())
    script = "(exec -a gcs_server sleep 60) & (exec -a raylet sleep 60) & read; kill %2; wait %2; echo; wait"
    with subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ray_start:
        assert ray_start.stdin is not None
        assert ray_start.stdout is not None
        head = mark(ray_start.pid)
        assert head is not None
        while len(programs_below(head)) < 2 or "bash" in programs_below(head):  # between fork and exec
            assert ray_start.poll() is None
        scans.clear()
        assert parts_run(head)
        assert bool(scans) != listed, "the machine's processes are looked through only in doubt"
        ray_start.stdin.write(b"\n")
        ray_start.stdin.flush()
        ray_start.stdout.readline()
        assert not parts_run(head)
        end(descendants(head.pid), grace_s=0.0)


def test_edges_are_those_that_serve_and_not_one_that_checks_the_file(tmp_path: Path, start: Start) -> None:
    layout = Layout(tmp_path / "state")
    assert edges_of(layout) == ()
    first = start("-db", "-f", str(layout.edge_config))
    start("-c", "-q", "-f", str(layout.edge_config))
    start("-db", "-f", str(Layout(tmp_path / "other").edge_config))
    second = start("-db", "-f", str(layout.edge_config))
    found = edges_of(layout)
    assert {edge.pid for edge in found} == {first, second}
    assert [edge.started for edge in found] == sorted((edge.started for edge in found), reverse=True)


def test_the_head_is_the_one_that_started_ray_and_none_of_rays_own_parts(tmp_path: Path, start: Start) -> None:
    layout = Layout(tmp_path / "state")
    folder = f"--temp-dir={layout.ray_temp}"
    head = start("start", "--head", "--block", folder)
    start("log_monitor.py", folder)
    start("start", "--head", "--block", f"--temp-dir={Layout(tmp_path / 'other').ray_temp}")
    assert [found.pid for found in heads_of(layout)] == [head]


def test_supervisors_and_deployments_are_told_apart(tmp_path: Path, start: Start) -> None:
    layout = Layout(tmp_path / "state")
    supervisor = start("-m", "gateway_plugin.service.supervisor", "--state", str(layout.state))
    deployment = start("-m", "gateway_plugin.service.deploy", "--state", str(layout.state))
    start("-m", "gateway_plugin.service.supervisor", "--state", str(tmp_path / "other"))
    assert [found.pid for found in supervisors_of(layout)] == [supervisor]
    assert [found.pid for found in deployments_of(layout)] == [deployment]
