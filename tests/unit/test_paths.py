"""Folders and files that are nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout, write_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_is_0600_replaced_whole_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert (path.read_text(), mode(path), [p.name for p in tmp_path.iterdir()]) == ("new", 0o600, ["key"])


def test_two_state_folders_never_share_a_run_folder_and_its_sockets_fit(tmp_path: Path) -> None:
    one, two = Layout(tmp_path / "one"), Layout(tmp_path / "two")
    assert one.run != two.run
    for socket in (one.edge_socket, one.inner_door, one.cold_door, one.around_door):
        assert len(str(socket)) < 100  # AF_UNIX ends at 107


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is somebody else's")
def test_where_another_user_sits_on_the_name_of_the_run_folder_the_next_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    taken = layout.run
    taken.mkdir()
    os.chown(taken, 65534, 65534)
    second = layout.run
    assert second.name == f"{taken.name}-1"
    private_folder(second)
    taken.rmdir()  # the name is free again, and means nothing: what runs is found where it runs
    assert layout.run == second
    second.rmdir()
    taken.symlink_to(tmp_path)
    assert layout.run == second
