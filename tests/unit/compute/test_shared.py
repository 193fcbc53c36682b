"""The shared folder of a multi-user endpoint: readable by all, whatever root's umask; changed by root alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.compute import shared
from gateway_plugin.errors import ConfigError

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="a multi-user endpoint is root's")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of root's that everybody reaches, as /opt is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield int(request.param)
    os.umask(before)


def test_it_is_readable_whatever_the_umask_is(place: Path, umask: int) -> None:
    shared.make(place / "a/b")
    assert [(place / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o755, 0o755]
    assert os.umask(umask) == umask, "as it was"
    (place / "a/b").chmod(0o700)
    shared.make(place / "a/b")
    assert (place / "a/b").stat().st_mode & 0o777 == 0o755, "one that is there already too"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_folder_that_others_write_to_is_refused(place: Path, mode: int) -> None:
    (place / "a").mkdir()
    (place / "a").chmod(mode)
    with pytest.raises(ConfigError, match="others than root"):
        shared.make(place / "a")
    if mode == 0o1777:
        shared.make(place / "a/b")  # as in /tmp: nobody but its owner can replace it
        return
    with pytest.raises(ConfigError, match=str(place / "a")):
        shared.make(place / "a/b/c")


def test_a_folder_of_another_user_is_refused(place: Path) -> None:
    (place / "a").mkdir()
    os.chown(place / "a", 65534, 65534)
    with pytest.raises(ConfigError, match=str(place / "a")):
        shared.make(place / "a/b")


def test_a_way_that_nobody_may_go_is_refused(place: Path) -> None:
    (place / "a").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="lets nobody pass"):
        shared.make(place / "a/b")


def test_a_program_is_one_that_everybody_may_run(place: Path) -> None:
    programs = place / "venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to("/bin/sh")
    program = programs / "globus-compute-endpoint"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with pytest.raises(ConfigError, match="cannot be run"):
        shared.check_program(program)
    program.chmod(0o755)
    shared.check_program(program)
