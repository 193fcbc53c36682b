"""What is said of a folder, an address and an environment."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider, SlurmProvider

from gateway_plugin.doctor import scheduler as site_checks
from gateway_plugin.doctor.scheduler import every_site_check, file_system
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import SchedulerSilent
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType, Site

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /run tmpfs rw 0 0
10.0.0.1@o2ib:/home /users lustre rw 0 0
server:/a /users/with\\040blank nfs4 rw 0 0
overlay /nonsense
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/state", "ext4"),
        ("/users/u/.gateway", "lustre"),
        ("/users/with blank/state", "nfs4"),
        ("/usersother/u", "ext4"),
        ("/run/user/0/state", "tmpfs"),
    ],
)
def test_the_file_system_of_a_folder_that_may_not_be_there_yet(folder: str, kind: str) -> None:
    assert file_system(Path(folder), MOUNTS) == kind


def test_without_any_mounts_nothing_is_claimed() -> None:
    assert file_system(Path("/x"), "") == "an unknown file system"


def test_a_site_on_this_machine_alone_has_no_scheduler_to_check(tmp_path: Path) -> None:
    provider = LocalProvider(launcher=SimpleLauncher())
    kind = NodeType(name="local", provider=provider, cpus=1, engine_memory_gib=1)
    assert every_site_check(Layout(tmp_path), Site(name="s", node_types=(kind,))) == ()


@pytest.mark.process
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, "the default route's interface has it"),
        ({"head_interface": "eth0"}, "the site says it"),
        ({"head_address": "8.8.8.8"}, "the site says it"),
    ],
)
def test_an_address_that_the_internet_reaches_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], why: str
) -> None:
    monkeypatch.setattr(site_checks, "head_address", lambda site: "8.8.8.8")
    for provider in (LocalProvider(launcher=SimpleLauncher()), SlurmProvider(launcher=SimpleLauncher())):
        kind = NodeType(name="n", provider=provider, cpus=1, engine_memory_gib=1)
        (found,) = [
            check
            for check in every_site_check(
                Layout(tmp_path), Site.model_validate({"name": "s", "node_types": (kind,), **values})
            )
            if check.name == "address for nodes"
        ]
        assert found.verdict is Verdict.WARN
        assert why in found.found
        assert "8.8.8.8" in found.found
        assert "head_interface=" in found.advice


@pytest.mark.process
def test_an_address_of_a_private_network_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = NodeType(name="n", provider=SlurmProvider(launcher=SimpleLauncher()), cpus=1, engine_memory_gib=1)

    def verdict(address: str) -> Verdict:
        monkeypatch.setattr(site_checks, "head_address", lambda site: address)
        checks: tuple[Check, ...] = every_site_check(Layout(tmp_path), Site(name="s", node_types=(kind,)))
        return next(check.verdict for check in checks if check.name == "address for nodes")

    assert verdict("10.1.2.3") is verdict("172.20.0.4") is Verdict.OK
    assert verdict("127.0.0.1") is Verdict.FAIL


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "stderr", "expected"),
    [
        (0, "sbatch: Job 7 to start at 2026-11-26T12:28:12 using 2 processors", True),
        (1, "allocation failure: Invalid qos specification", False),
        (1, "allocation failure: Socket timed out on send/recv operation", None),
        (1, "allocation failure: Unable to contact slurm controller (connect failure)", None),
        (None, "", None),
    ],
)
def test_a_controller_that_does_not_answer_refuses_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, stderr: str, expected: bool | None
) -> None:
    def run(argv: Sequence[str], _: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        assert tuple(argv[:2]) == ("sbatch", "--test-only")
        if code is None:
            raise SchedulerSilent(f"sbatch gave no answer within {timeout_s:.0f} s")
        return subprocess.CompletedProcess(argv, code, "", stderr)

    monkeypatch.setattr(site_checks, "run_command", run)
    provider = SlurmProvider(launcher=SimpleLauncher(), walltime="01:00:00")
    kind = NodeType(name="q", provider=provider, cpus=1, engine_memory_gib=1)
    assert site_checks._tested(kind, Layout(tmp_path))[0] is expected
