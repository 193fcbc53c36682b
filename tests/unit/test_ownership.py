"""Which folders are believed, and which are refused before anything in them is read."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gateway_plugin import ownership
from gateway_plugin.errors import ServiceError
from gateway_plugin.ownership import demand_own, private_folder, problem_with

STRANGER = 65534

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is somebody else's")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_made_private_and_closed_if_they_could_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    assert mode(private_folder(folder)) == 0o700


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_is_made_above_a_folder_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        private_folder(tmp_path / "project" / "gateway" / "state")
    finally:
        os.umask(before)
    for path in ("project", "project/gateway", "project/gateway/state"):
        assert mode(tmp_path / path) == 0o700


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "real")
    with pytest.raises(ServiceError, match="is a link"):
        private_folder(tmp_path / "state")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    with pytest.raises(ServiceError, match="is a link"):
        private_folder(tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("given", [0o777, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused_since_what_is_in_it_may_be_theirs(
    tmp_path: Path, given: int
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(given)
    with pytest.raises(ServiceError, match=r"can be written to by others.*chmod go-w"):
        demand_own(folder)


def test_a_folder_that_others_can_put_in_its_place_is_refused(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "project" / "state")
    assert problem_with(folder) is None
    folder.parent.chmod(0o777)
    assert f"{folder.parent} can be written to by others" in (problem_with(folder) or "")
    assert problem_with(folder / "not" / "there") is not None
    folder.parent.chmod(0o1777)  # as /tmp: nobody renames what is another user's
    assert problem_with(folder) is None


def test_the_group_of_a_user_alone_is_nobody_else_and_another_group_is(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "project" / "state")
    folder.parent.chmod(0o775)
    assert problem_with(folder) is None
    if os.getuid() == 0:
        os.chown(folder.parent, 0, STRANGER)
        assert problem_with(folder) is not None


def test_a_link_on_the_way_counts_if_it_leads_to_a_place_under_the_same_rule(tmp_path: Path) -> None:
    private_folder(tmp_path / "disk" / "home")
    (tmp_path / "home").symlink_to(tmp_path / "disk" / "home")
    assert problem_with(tmp_path / "home" / "state") is None
    (tmp_path / "disk").chmod(0o777)
    assert f"{tmp_path / 'disk'} can be written to" in (problem_with(tmp_path / "home" / "state") or "")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ServiceError):
        private_folder(tmp_path / "a" / "state")


@as_root
def test_somebody_elses_folder_is_refused_and_so_is_what_lies_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "state"
    folder.mkdir(parents=True)
    os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(ServiceError, match="is not a folder of this user"):
        private_folder(folder)
    os.chown(folder, 0, 0)
    os.chown(folder.parent, STRANGER, STRANGER)
    with pytest.raises(ServiceError, match="belongs to another user"):
        private_folder(folder)


@as_root
def test_somebody_elses_link_on_the_way_is_refused(tmp_path: Path) -> None:
    private_folder(tmp_path / "real" / "state")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    assert "belongs to another user" in (problem_with(link / "state") or "")


@as_root
def test_in_a_container_the_machines_root_is_above_and_a_strangers_folder_is_still_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = private_folder(tmp_path / "home" / "state")
    os.chown(folder.parent, STRANGER, STRANGER)  # as users outside show inside
    assert problem_with(folder) is not None
    monkeypatch.setattr(ownership, "_unmapped_owner", lambda: STRANGER)
    assert problem_with(folder) is None
    os.chown(folder, STRANGER, STRANGER)
    assert "is not a folder of this user" in (problem_with(folder) or "")


def test_a_client_s_machine_need_not_be_a_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: Path, **_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_proc)
    ownership._unmapped_owner.cache_clear()
    assert problem_with(tmp_path / "state") is None
    ownership._unmapped_owner.cache_clear()


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="there is no bubblewrap to make a user namespace with")
def test_a_container_is_known_by_its_user_namespace() -> None:
    program = "from gateway_plugin.ownership import _unmapped_owner; print(_unmapped_owner())"
    words = ("bwrap", "--unshare-user", "--dev-bind", "/", "/", sys.executable, "-c", program)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout.strip() == str(STRANGER)
