"""Answers that the function kept, removed by the endpoint's commands: as the user that they belong to."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway_plugin.errors import ServiceError
from gateway_plugin.globus import function, kept
from tests.support.globus.account import reachable_python

MAPPED = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root becomes mapped users")
NAME = f"{7:064x}.jsonl"


def answers_in(folder: Path, uid: int) -> Path:
    """A folder of answers as the function leaves it, with one file."""
    folder.mkdir(mode=0o700, parents=True)
    (folder / NAME).touch()
    (folder / function.TALLY).write_bytes(b"..")
    for path in (folder, *folder.iterdir()):
        os.chown(path, uid, uid)
    return folder


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody reaches."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def venv(place: Path) -> Path:
    """An environment whose interpreter everybody may run."""
    (place / "venv/bin").mkdir(parents=True)
    (place / "venv/bin/python").symlink_to(str(reachable_python()))
    return place / "venv"


@pytest.fixture
def home(place: Path) -> Path:
    (place / "home").mkdir()
    os.chown(place / "home", MAPPED, MAPPED)
    return place / "home"


@contextmanager
def running(**environment: str) -> Iterator[None]:
    """A process of a mapped user's."""
    with subprocess.Popen(["/bin/sleep", "60"], env=environment, user=MAPPED, group=MAPPED, extra_groups=[]) as process:
        try:
            yield
        finally:
            process.kill()


def test_a_users_own_are_removed_and_counted(tmp_path: Path, venv: Path) -> None:
    answers = str(tmp_path / "answers/gateway")
    assert kept.tasks_done(answers) == 0
    folder = answers_in(Path(f"{answers}-{os.getuid()}"), os.getuid())
    assert kept.tasks_done(answers) == 2
    kept.forget(answers, venv, ())
    assert [path.name for path in folder.glob("*") if path.name != function.ROOM] == [function.TALLY]
    kept.remove(answers)
    assert not folder.exists()


def test_of_mapped_users_nothing_is_counted() -> None:
    assert kept.tasks_done("gateway-plugin/gw-1234") is None


@pytest.mark.process
@needs_root
def test_mapped_users_are_those_whose_workers_read_the_endpoints_site_file(home: Path) -> None:
    site = {function.SITE_VARIABLE: str(home / "gw.site.json")}
    with (
        running(HOME="/other", **{function.SITE_VARIABLE: "/other.site.json"}),
        running(HOME=str(home), XDG_STATE_HOME="/x", SECRET="s", **site),
        running(),
    ):
        found = kept.users_of(home / "gw.site.json")
    assert found == (kept.User(MAPPED, MAPPED, (("HOME", str(home)), ("XDG_STATE_HOME", "/x"))),)
    assert kept.users_of(home / "gw.site.json") == ()


@pytest.mark.process
@needs_root
def test_a_mapped_users_are_removed_as_that_user(home: Path, venv: Path) -> None:
    folder = answers_in(home / f".local/state/gateway-plugin/gw-1-{MAPPED}", MAPPED)
    with running(HOME=str(home), **{function.SITE_VARIABLE: str(home / "gw.site.json")}):
        users = kept.users_of(home / "gw.site.json")
    kept.forget("gateway-plugin/gw-1", venv, users)
    assert sorted(path.name for path in folder.iterdir()) == [function.ROOM, function.TALLY]
    assert (folder / function.ROOM).stat().st_uid == MAPPED


@pytest.mark.process
@needs_root
def test_a_mapped_user_cannot_have_root_remove_what_is_anothers(home: Path, venv: Path, place: Path) -> None:
    """By a home that leads elsewhere: the commands are root's, what they remove is the user's alone."""
    others = answers_in(place / f"roots-{MAPPED}", 0)
    others.chmod(0o755)
    (home / f"roots-{MAPPED}").symlink_to(others)
    for state in (place, home):
        kept.forget("roots", venv, [kept.User(MAPPED, MAPPED, (("XDG_STATE_HOME", str(state)),))])
    assert (others / NAME).exists()


@pytest.mark.process
@needs_root
def test_a_user_whose_answers_are_left_is_named(home: Path, venv: Path) -> None:
    (venv / "bin/python").unlink()
    user = kept.User(MAPPED, MAPPED, (("HOME", str(home)),))
    with pytest.raises(ServiceError, match=f"user {MAPPED}"):
        kept.forget("gateway-plugin/gw-1", venv, [user])
    (venv / "bin/python").symlink_to("/bin/false")
    with pytest.raises(ServiceError, match=f"user {MAPPED}"):
        kept.forget("gateway-plugin/gw-1", venv, [user])
