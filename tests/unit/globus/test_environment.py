"""The endpoint's environment: root's is built on what only root can change; packages are known by their hashes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.errors import ServiceError
from gateway_plugin.globus.endpoint import shared_folder as shared
from gateway_plugin.globus.endpoint import venv as environment


class Commands:
    """What would be run; ``uv`` fails, as where only pip finds the way out."""

    def __init__(self) -> None:
        self.argvs: list[list[str]] = []

    def __call__(self, argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.argvs.append(argv)
        if "venv" in argv:
            Path(argv[-1], "bin").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(argv, 1 if argv[0].endswith("uv") else 0, "", "")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(subprocess, "run", made)
    return made


@pytest.fixture
def alice() -> Iterator[Path]:
    """A folder of another user's, with an interpreter and a ``uv``."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        bin_folder = Path(folder, "alice/bin")
        bin_folder.mkdir(parents=True)
        for name in ("python3.11", "uv"):
            (bin_folder / name).touch(mode=0o755)
        os.chown(bin_folder, 65534, 65534)
        yield bin_folder


def test_packages_are_installed_by_their_hashes_alone(tmp_path: Path, commands: Commands) -> None:
    environment.make(tmp_path / "venv", lambda _: None)
    installs = [argv for argv in commands.argvs if "install" in argv]
    assert installs
    assert all({"--require-hashes", "--no-deps"} <= set(argv) for argv in installs)


def test_every_package_of_the_list_has_a_hash() -> None:
    text = Path(environment.__file__).with_name("requirements.txt").read_text()
    entries = re.findall(r"^([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", text, re.MULTILINE)
    assert len(entries) == sum("==" in line for line in text.splitlines() if not line.startswith("#")) > 50
    assert [name for name, _, hashes in entries if not hashes] == []


@pytest.mark.process
def test_what_lies_in_the_working_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m venv`` alone takes a ``venv`` of the working folder for the library's."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/__init__.py").touch()
    (tmp_path / "venv/__main__.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "_uv", lambda: None)
    monkeypatch.setattr(environment, "_WHAT", ("--help",))
    environment.make(tmp_path / "made", lambda _: None)
    assert (tmp_path / "made/bin/python").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="for root alone")
def test_root_builds_on_no_interpreter_and_runs_no_program_of_a_users(
    alice: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "_base_executable", str(alice / "python3.11"))
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: str(alice / name) if name == "uv" else "/usr/bin/" + name
    )
    environment.make(tmp_path / "venv", lambda _: None)
    assert commands.argvs[0][:4] == ["/usr/bin/python3", "-I", "-m", "venv"]
    assert not any(str(alice) in word for argv in commands.argvs for word in argv)
    assert shared.interpreter(alice / "python3.11") == Path("/usr/bin/python3")


@pytest.mark.process
@pytest.mark.parametrize("program", ["printf '\\377'; exit 1", "exec sleep 60"])
def test_an_installer_that_writes_no_text_or_hangs_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    installer = tmp_path / "uv"
    installer.write_text(f"#!/bin/sh\n{program}\n")
    installer.chmod(0o755)
    monkeypatch.setattr(environment, "_PATIENCE_S", 0.5 if "sleep" in program else 30.0)
    with pytest.raises(ServiceError, match=r"environment could not be made.*uv"):
        environment._run([str(installer)])
