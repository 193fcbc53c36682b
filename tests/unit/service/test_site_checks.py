"""What is said of a folder, an address and an environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider

from gateway_plugin.layout import Layout
from gateway_plugin.service.site_checks import every_site_check, file_system
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
