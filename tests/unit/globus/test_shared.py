"""The shared folder of a multi-user endpoint: readable by all, whatever root's umask; changed by root alone."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway_plugin.errors import ConfigError
from gateway_plugin.globus.endpoint import shared_folder as shared
from gateway_plugin.globus.endpoint.store import Options

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


# --- what root runs ---
@pytest.fixture
def venv(place: Path) -> Path:
    """An environment as ``python -m venv`` makes it."""
    made = place / "venv"
    packages = made / "lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    (packages / "module.py").touch()
    (made / "lib64").symlink_to("lib")
    (made / "bin").mkdir()
    (made / "bin/python").symlink_to("/usr/bin/python3")
    (made / "bin/globus-compute-endpoint").write_text("#!/bin/sh\n")
    (made / "bin/globus-compute-endpoint").chmod(0o755)
    (made / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    shared.check_program(made / "bin/globus-compute-endpoint")
    return made


def of_alice(path: Path) -> Path:
    os.lchown(path, 65534, 65534)
    return path


def interpreter_of(venv: Path, prefix: Path) -> Path:
    """Have it built on an interpreter in ``prefix``."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "lib/python3.11").mkdir(parents=True)
    (prefix / "lib/python3.11/os.py").touch()
    (prefix / "bin/python3.11").touch(mode=0o755)
    (prefix / "bin/python3.11").chmod(0o755)
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to(prefix / "bin/python3.11")
    (venv / "pyvenv.cfg").write_text(f"home = {prefix / 'bin'}\n")
    shared.check_environment(venv)
    return prefix


def program(place: Path, venv: Path) -> Path:
    return of_alice(venv / "bin/globus-compute-endpoint")


def writable_module(place: Path, venv: Path) -> Path:
    path = venv / "lib/python3.11/site-packages/module.py"
    path.chmod(0o664)
    return path


def sticky_packages(place: Path, venv: Path) -> Path:
    path = venv / "lib/python3.11/site-packages"
    path.chmod(0o1777)
    return path


def folder_above(place: Path, venv: Path) -> Path:
    place.chmod(0o775)
    return place


def base_interpreter(place: Path, venv: Path) -> Path:
    return of_alice(interpreter_of(venv, place / "alice") / "bin/python3.11")


def base_library(place: Path, venv: Path) -> Path:
    return of_alice(interpreter_of(venv, place / "alice") / "lib/python3.11/os.py")


def base_prefix(place: Path, venv: Path) -> Path:
    return of_alice(interpreter_of(venv, place / "alice"))


def home_of_the_base(place: Path, venv: Path) -> Path:
    """Python takes its library from where ``home`` says, whatever ``bin/python`` is a link to."""
    (place / "alice/bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(f"home = {place / 'alice/bin'}\n")
    return of_alice(place / "alice")


def link_of_alice(place: Path, venv: Path) -> Path:
    """To an interpreter that is root's, today."""
    (place / "alice").mkdir()
    (place / "alice/python").symlink_to("/usr/bin/python3")
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to(place / "alice/python")
    of_alice(place / "alice/python")
    return of_alice(place / "alice")


def linked_packages(place: Path, venv: Path) -> Path:
    (place / "elsewhere").mkdir()
    (place / "elsewhere/inner.py").touch()
    (venv / "lib/python3.11/site-packages/linked").symlink_to(place / "elsewhere")
    return of_alice(place / "elsewhere/inner.py")


def path_file(place: Path, venv: Path) -> Path:
    (place / "source").mkdir()
    (venv / "lib/python3.11/site-packages/x.pth").write_text(f"# a comment\nimport os\n{place / 'source'}\n")
    return of_alice(place / "source")


def editable(place: Path, venv: Path) -> Path:
    path = venv / "lib/python3.11/site-packages/__editable___x_finder.py"
    path.touch()
    return path


@pytest.mark.parametrize(
    "change",
    [
        program, writable_module, sticky_packages, folder_above, base_interpreter, base_library, base_prefix,
        home_of_the_base, link_of_alice, linked_packages, path_file, editable,
    ],
)  # fmt: skip
def test_an_environment_that_others_can_change_is_refused_by_name(
    place: Path, venv: Path, change: Callable[[Path, Path], Path]
) -> None:
    offending = change(place, venv)
    with pytest.raises(ConfigError) as caught:
        shared.check_environment(venv)
    assert caught.value.message.startswith(f"{offending}")


def test_uvs_own_lock_is_everybodys_and_harmless(venv: Path) -> None:
    (venv / ".lock").touch()
    (venv / ".lock").chmod(0o666)
    shared.check_environment(venv)


def test_links_that_go_round_end(venv: Path) -> None:
    (venv / "lib/a").symlink_to("b")
    (venv / "lib/b").symlink_to("a")
    with pytest.raises(ConfigError, match="more than 40 links"):
        shared.check_environment(venv)


@pytest.mark.parametrize("option", ["identity_mapping", "ca", "shared_folder"])
def test_a_file_that_a_multi_user_endpoint_reads_is_only_roots_to_change(place: Path, option: str) -> None:
    path = place / "folder/thing"
    path.parent.mkdir()
    path.mkdir() if option == "shared_folder" else path.touch()
    options = Options.model_validate({"multi_user": True, option: path})
    shared.check_files(options)
    for part in (path, path.parent):
        of_alice(part)
        with pytest.raises(ConfigError, match=f"^{part}.* is nobody's.*--{option.replace('_', '-')}"):
            shared.check_files(options)
        os.chown(part, 0, 0)
        part.chmod(0o775)
        with pytest.raises(ConfigError, match=f"^{part}.*group.*chmod go-w"):
            shared.check_files(options)
        part.chmod(0o755)
    shared.check_files(options)
    of_alice(path)
    shared.check_files(options.model_copy(update={"multi_user": None}))


def test_the_systems_interpreter_is_taken_where_the_gateways_own_is_a_users(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "system").mkdir()
    for folder, name in (("system", "python3.9"), ("system", "python3.12"), (".", "own")):
        (place / folder / name).touch(mode=0o755)
    (place / "system/python3").symlink_to("python3.9")
    monkeypatch.setattr(shared, "_SYSTEM_PATH", str(place / "system"))
    assert shared.interpreter(place / "own") == place / "own"
    of_alice(place / "own")
    assert shared.interpreter(place / "own") == place / "system/python3.12", "python3 is too old there"
    of_alice(place / "system")
    with pytest.raises(ConfigError, match=f"^{place / 'own'} is nobody's.*install the system's Python"):
        shared.interpreter(place / "own")


def test_an_authority_is_copied_where_every_mapped_user_reads_it(place: Path, umask: int) -> None:
    (place / "private").mkdir(mode=0o700)
    (place / "private/ca.pem").write_text("a certificate")
    made = shared.copy(place / "private/ca.pem", place / "gw.ca.pem")
    assert (made.read_text(), made.stat().st_mode & 0o777) == ("a certificate", 0o644)
    of_alice(place / "private/ca.pem")
    with pytest.raises(ConfigError, match=r"is nobody's.*--ca"):
        shared.copy(place / "private/ca.pem", place / "gw.ca.pem")
    with pytest.raises(ConfigError, match="cannot be read"):
        shared.copy(place / "none", place / "gw.ca.pem")


def test_a_program_that_root_runs_to_map_a_caller_is_only_roots_to_change(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping, script = place / "map.json", place / "alice/map.sh"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    options = Options(multi_user=True, identity_mapping=mapping)
    for command in ([str(script)], ["/bin/sh", str(script), "-x", 7], ["map.sh"]):
        entry = {"DATA_TYPE": "external_identity_mapping#1.0.0", "command": command}
        for document in (entry, [{"DATA_TYPE": "expression_identity_mapping#1.0.0", "mappings": []}, entry]):
            mapping.write_text(json.dumps(document))
            shared.check_files(options)
            of_alice(script)
            with pytest.raises(ConfigError, match=f"^{script} is nobody's"):
                shared.check_files(options)
            os.chown(script, 0, 0)
    for text in ("{", "[7]", '{"command": "x"}'):
        mapping.write_text(text)
        shared.check_files(options)
