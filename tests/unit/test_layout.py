"""Folders and files that are nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gateway_plugin.errors import ServiceError
from gateway_plugin.layout import Layout, private_folder, write_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_made_private_and_closed_if_they_were_open(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    assert mode(private_folder(folder)) == 0o700


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "real")
    with pytest.raises(ServiceError, match="is not a folder of this user"):
        private_folder(tmp_path / "state")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is somebody else's")
def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(ServiceError, match="is not a folder of this user"):
        private_folder(folder)


def test_a_private_file_is_0600_replaced_whole_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert (path.read_text(), mode(path), [p.name for p in tmp_path.iterdir()]) == ("new", 0o600, ["key"])


def test_two_state_folders_never_share_a_run_folder_and_its_sockets_fit(tmp_path: Path) -> None:
    one, two = Layout(tmp_path / "one"), Layout(tmp_path / "two")
    assert one.run != two.run
    for socket in (one.edge_socket, one.inner_door, one.cold_door):
        assert len(str(socket)) < 100  # AF_UNIX ends at 107
