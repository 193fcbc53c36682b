"""Engines in runtimes, started by a node agent: another Python, modules, a container; and what they leave: nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_plugin import engine_records
from gateway_plugin.blocks.cleanup import clean_up
from gateway_plugin.engine_records import strays
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive, group_members
from gateway_plugin.runtimes import Runtime
from serve.core.events import EngineExited, EngineReady
from tests.support.agents import (
    KEY,
    NAMED,
    AgentHost,
    engine_client,
    eventually,
    fake_model,
    own_block,
    plain_model,
    private_layout,
)
from tests.support.images import ROOT, charliecloud, missing

pytestmark = pytest.mark.process

WITHOUT = missing()
needs_container = pytest.mark.skipif(bool(WITHOUT), reason=f"no container: {WITHOUT}")


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Layout]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # homes of containers
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", own_block())
    with private_layout() as made:
        yield made


@pytest.fixture
def host(layout: Layout) -> Iterator[AgentHost]:
    made = AgentHost(layout)
    yield made
    made.close()


@pytest.fixture
def box(tmp_path: Path) -> Runtime:
    return charliecloud(tmp_path / "image")


def runtime(**fields: Any) -> Runtime:
    return Runtime.model_validate({"name": "box", "env": {"PYTHONPATH": str(ROOT)}, **fields})


def ask(layout: Layout, host: AgentHost, prompt: str = "hello") -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]}
    with engine_client(layout, host.record().address) as client:
        answer = client.post("/v1/chat/completions", json=body, extensions=NAMED)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def ended(host: AgentHost, **fields: Any) -> str:
    """The reason for which an engine with these fields cannot be started."""
    began = time.monotonic()
    host.start(fake_model("tiny", **fields))
    exited = host.wait(EngineExited)
    assert not exited.expected
    assert time.monotonic() - began < 30, "seconds, not load_timeout"
    return exited.reason


# --- a container ---


@needs_container
def test_an_engine_in_a_container_answers_and_leaves_nothing(layout: Layout, host: AgentHost, box: Runtime) -> None:
    host.start(fake_model("tiny", "generate", "--children", "2", runtime=box))
    host.wait(EngineReady)
    record = host.record()
    members = group_members(record.mark)
    assert len(members) == 3
    assert ask(layout, host).startswith("tiny pid=")
    assert all(
        Path(f"/proc/{known.pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink() for known in members
    )
    assert not any(KEY in word for known in members for word in psutil.Process(known.pid).cmdline())
    scratch = Path(record.scratch)
    assert scratch.is_dir()
    host.stop()
    assert host.wait(EngineExited).expected
    assert not any(alive(known) for known in members)
    assert not scratch.exists()
    assert strays(record.log, record.mark) == ()


@needs_container
def test_a_bind_without_a_mount_point_in_the_image(host: AgentHost, box: Runtime) -> None:
    assert box.container is not None
    with tempfile.TemporaryDirectory(dir="/var/tmp") as bound:
        container = box.container.model_copy(update={"binds": (*box.container.binds, bound)})
        host.start(fake_model("tiny", runtime=box.model_copy(update={"container": container})))
        host.wait(EngineReady)
        assert Path(f"/proc/{host.record().pid}/root{bound}").is_dir()


@needs_container
def test_a_container_has_a_home_and_a_tmp_of_its_own(layout: Layout, host: AgentHost, box: Runtime) -> None:
    of_the_node = Path(f"/tmp/gwt-of-the-node-{os.getpid()}")
    of_the_node.touch()
    try:
        host.start(fake_model("tiny", runtime=box))
        host.wait(EngineReady)
        environ = dict(psutil.Process(host.record().pid).environ())
        assert environ["HOME"].endswith("/gateway-plugin/homes/box")
        root = Path(f"/proc/{host.record().pid}/root")
        assert not (root / "tmp" / of_the_node.name).exists()
        assert (root / environ["HOME"].lstrip("/")).is_dir()
        assert environ["PATH"].startswith("/usr/local/sbin:")
    finally:
        of_the_node.unlink()


@needs_container
def test_an_engine_in_a_container_is_adopted_by_the_next_agent(layout: Layout, host: AgentHost, box: Runtime) -> None:
    host.start(fake_model("tiny", runtime=box))
    host.wait(EngineReady)
    before = host.record()
    host.crash()
    host.wait(EngineReady)
    assert host.record().mark == before.mark
    assert ask(layout, host)
    host.stop()
    host.wait(EngineExited)
    assert strays(before.log, before.mark) == ()
    assert not Path(before.scratch).exists()


@needs_container
def test_a_container_that_ignores_sigterm_is_killed_with_all_of_it(host: AgentHost, box: Runtime) -> None:
    host.start(fake_model("tiny", "generate", "--ignore-sigterm", "--children", "2", runtime=box))
    host.wait(EngineReady)
    record, members = host.record(), group_members(host.record().mark)
    began = time.monotonic()
    host.stop()
    host.wait(EngineExited)
    assert time.monotonic() - began >= host.timing.grace_s
    assert not any(alive(known) for known in members)
    assert strays(record.log, record.mark) == ()


@needs_container
def test_the_end_of_a_block_leaves_nothing_of_a_container(layout: Layout, host: AgentHost, box: Runtime) -> None:
    host.start(fake_model("tiny", "generate", "--children", "1", runtime=box))
    host.wait(EngineReady)
    record, members = host.record(), group_members(host.record().mark)
    host.crash()
    assert engine_records.end_engines(layout.engine_records, record.block, grace_s=0.5) == ()
    assert not any(alive(known) for known in members)
    assert not Path(record.scratch).exists()


@needs_container
@pytest.mark.parametrize("socket", [True, False], ids=["socket", "port"])
def test_an_engine_behind_a_doorman_in_a_container(layout: Layout, host: AgentHost, box: Runtime, socket: bool) -> None:
    host.start(plain_model("tiny", socket=socket, source="none", runtime=box))
    host.wait(EngineReady)
    record = host.record()
    assert ask(layout, host).startswith("tiny pid=")
    assert not any(
        KEY in word for known in group_members(record.mark) for word in psutil.Process(known.pid).environ().values()
    )
    host.crash()
    host.wait(EngineReady)
    assert host.record().mark == record.mark
    (door,) = (p for m in group_members(record.mark) if (p := psutil.Process(m.pid)).name() == "haproxy")
    door.kill()
    assert not host.wait(EngineExited).expected
    assert strays(record.log, record.mark) == group_members(record.mark) == ()
    assert not [path for path in layout.run.rglob("*") if "e1" in path.name or path.parent.name == "doors"]


@needs_container
@pytest.mark.skipif(os.getuid() != 0, reason="root's alone is refused before its start")
def test_an_engine_that_is_not_started_leaves_no_folder(layout: Layout, host: AgentHost, box: Runtime) -> None:
    host.isolate = "required"
    host.agent = host._new()
    assert "Charliecloud does not run inside bubblewrap as root" in ended(host, runtime=box)
    assert list(layout.scratch.iterdir()) == []


def test_an_engine_that_must_not_be_recorded_is_ended_with_its_doorman(
    layout: Layout, host: AgentHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        time.sleep(0.3)  # the doorman has begun
        raise ServiceError("the folder is another user's")

    monkeypatch.setattr("serve.agent.records.write", refuse)
    assert "another user's" in ended(host)
    host.start(plain_model("b", socket=True), engine="e2")
    assert "another user's" in host.wait(EngineExited, "e2").reason
    for name in ("e1", "e2"):
        assert strays(str(layout.engine_logs / f"{name}.log"), Mark(0, 0)) == ()
    assert list((layout.run / "doors").iterdir()) == []


@needs_container
@pytest.mark.parametrize("how", ["garbled", "unrecorded"])
def test_an_engine_without_a_usable_record_ends(layout: Layout, host: AgentHost, box: Runtime, how: str) -> None:
    """Garbled: by the next agent of its block. Without one, as on a full disk: with its block."""
    host.start(plain_model("tiny", "generate", "--children", "1", socket=True, source="none", runtime=box))
    host.wait(EngineReady)
    record, members = host.record(), group_members(host.record().mark)
    host.crash()
    (path,) = layout.engine_records.iterdir()
    if how == "garbled":
        path.write_text("{")
        host.describe()
        assert [*layout.engine_records.iterdir(), *layout.scratch.iterdir(), *(layout.run / "doors").iterdir()] == []
    else:
        path.unlink()
        assert clean_up(layout.engine_records, record.block, layout.run / "of-the-block")
    assert not any(alive(known) for known in members)
    assert strays(record.log, record.mark) == ()


# --- what left the process group ---

DAEMON = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
null = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def daemon_model(prefix: tuple[str, ...] = ()) -> Any:
    plain = fake_model("tiny")
    words = plain.command[1:]
    return plain.model_copy(update={"command": (*prefix, "{python}", "-c", DAEMON, *words)})


def test_an_engine_that_forks_away_fails_and_leaves_nothing(layout: Layout, host: AgentHost) -> None:
    host.start(daemon_model())
    exited = host.wait(EngineExited)
    assert not exited.expected
    log = next(layout.engine_logs.glob("*.log"))
    assert strays(str(log), Mark(0, 0)) == ()


def test_a_helper_that_left_the_group_is_ended_with_its_engine(layout: Layout, host: AgentHost) -> None:
    """As a container's monitor, or a daemon of its own: here a shell that starts one and becomes the engine."""
    plain = fake_model("tiny")
    script = 'setsid sleep 600 </dev/null >/dev/null 2>&1 & exec "$@"'
    host.start(plain.model_copy(update={"command": ("bash", "-c", script, "sh", *plain.command)}))
    host.wait(EngineReady)
    record = host.record()
    group = {known.pid for known in group_members(record.mark)}
    assert eventually(lambda: {known.pid for known in strays(record.log, record.mark)} > group)
    left = [known for known in strays(record.log, record.mark) if known.pid not in group]
    host.stop()
    host.wait(EngineExited)
    assert not any(alive(known) for known in left)


PODMAN = """#!/bin/bash
case "$2" in
rm) kill -9 "$(cat {folder}/container)" 2>/dev/null; exit 0;;
esac
while [ "$1" != gateway-test ]; do shift; done
shift
setsid -f bash -c 'echo $$ > {folder}/container; exec "$@"' sh "$@" </dev/null >/dev/null 2>&1
exec sleep 600
"""
"""A stand-in: 'run' starts the engine beside itself, in a session of its own; 'rm' ends it."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path: conmon's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="gwp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(params=["stand-in", "podman"])
def podman(request: pytest.FixtureRequest, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime of podman, with this Python in an image of empty folders."""
    box = charliecloud(tmp_path / "image")
    assert box.container is not None
    container = {"kind": "podman", "image": "gateway-test", "binds": box.container.binds}
    if request.param == "stand-in":
        stand_in = tmp_path / "bin/podman"
        stand_in.parent.mkdir()
        stand_in.write_text(PODMAN.format(folder=tmp_path))
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
        return runtime(python=sys.executable, container=container)
    if shutil.which("podman") is None:
        pytest.skip("there is no podman on PATH (package podman)")
    (place / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{place}/root"\nrunroot = "{place}/run"\n'
    )
    oci = "runc" if shutil.which("runc") else "crun"
    limits = '["nofile=1024:1024", "nproc=1024:1024"]'  # below what a container in a container may have
    (place / "containers.conf").write_text(f'[containers]\ndefault_ulimits = {limits}\n[engine]\nruntime = "{oci}"\n')
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(place / "storage.conf"))
    monkeypatch.setenv("CONTAINERS_CONF", str(place / "containers.conf"))
    pack = f"tar -C {tmp_path}/image -c . | podman import - gateway-test && podman --cgroup-manager=cgroupfs run --rm"
    binds = " ".join(f"-v {bind}:{bind}" for bind in box.container.binds)
    tried = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{pack} --network=host {binds} gateway-test /bin/true"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if tried.returncode:
        pytest.skip(f"podman does not run here: {(tried.stderr.splitlines() or ['failed'])[-1]}")
    return runtime(python=sys.executable, container=container)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_container_that_a_daemon_holds_is_ended(layout: Layout, host: AgentHost, podman: Runtime, how: str) -> None:
    host.start(fake_model("tiny", "generate", "--ignore-sigterm", runtime=podman))
    host.wait(EngineReady, timeout_s=40)
    record = host.record()
    group = {known.pid for known in group_members(record.mark)}
    held = [known for known in strays(record.log, record.mark) if known.pid not in group]
    assert held, "the test wants a container outside the process group"
    assert ask(layout, host).startswith("tiny pid=")
    if how == "stop":
        host.stop()
    else:
        os.kill(record.pid, signal.SIGKILL)  # podman itself, which passes nothing on then
    assert host.wait(EngineExited).expected == (how == "stop")
    assert not any(alive(known) for known in held)
    assert not Path(record.scratch).exists()
    assert record.remove[-1] == f"gateway-{layout.run.name}-e1"


# --- runtimes that are not there ---


def test_what_is_missing_is_said_at_once(host: AgentHost, tmp_path: Path) -> None:
    reason = ended(host, runtime=runtime(python="/sw/none/bin/python"))
    assert reason == "runtime 'box': there is no Python /sw/none/bin/python on this node"
    host.start(fake_model("b", runtime=runtime(container={"kind": "shifter", "image": "x"})), engine="e2")
    assert host.wait(EngineExited, "e2").reason == "runtime 'box': there is no shifter on PATH on this node"


@needs_container
def test_a_missing_image_and_a_missing_program_in_an_image(host: AgentHost, box: Runtime) -> None:
    assert box.container is not None
    container = box.container.model_copy(update={"image": "/sw/none.sqfs"})
    reason = ended(host, runtime=box.model_copy(update={"container": container}))
    assert reason == "runtime 'box': there is no image /sw/none.sqfs on this node"
    host.start(fake_model("b", runtime=box.model_copy(update={"python": "python9"})), engine="e2")
    exited = host.wait(EngineExited, "e2")
    assert "can't execve(2): python9: No such file or directory" in exited.reason


def test_a_python_without_the_engine_says_so(host: AgentHost, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    model = fake_model("tiny", runtime=Runtime(name="box", python=str(tmp_path / "env/bin/python")))
    host.start(model.model_copy(update={"engine": "vllm", "source": str(tmp_path), "command": ()}))
    reason = host.wait(EngineExited).reason
    assert "No module named 'vllm'" in reason
    assert str(tmp_path / "env/bin/python") in reason


def test_an_engine_that_does_not_know_an_option_says_so(host: AgentHost) -> None:
    assert "unrecognized arguments: --of-a-later-version" in ended(host, args=("--of-a-later-version",))


# --- a gateway's environment without an engine's packages ---

WITHOUT_ENGINES = """
import sys
for name in ("vllm", "torch", "transformers"):
    sys.modules[name] = None
import gateway_plugin.cli.main, serve.app
from gateway_plugin.catalog import parse_catalog
from gateway_plugin.service.preflight import failures, packages, runtimes
from gateway_plugin.site import load_site
from serve.core.events import EngineReady
from tests.support.agents import AgentHost, fake_model, private_layout

document = {"runtimes": {"box": {"python": sys.executable}},
            "models": {"m": {"source": "o/m", "memory_gib": 1, "runtime": "box"}}}
catalog, site = parse_catalog(document, "test"), load_site("local")
assert failures((*packages(site, catalog), *runtimes(site, catalog))) == ()
del document["models"]["m"]["runtime"]
(lacks,) = failures(packages(site, parse_catalog(document, "test")))
assert lacks.name == "package vllm", lacks
box = catalog.runtimes[0].model_copy(update={"env": {"PYTHONPATH": sys.argv[1]}})
with private_layout() as layout:
    host = AgentHost(layout)
    try:
        host.start(fake_model("tiny", runtime=box))
        host.wait(EngineReady)
    finally:
        host.close()
assert sys.modules["vllm"] is sys.modules["torch"] is sys.modules["transformers"] is None
"""


def test_an_environment_without_vllm_runs_engines_in_a_runtime() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ENGINES, str(ROOT)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


# --- another Python, modules ---


def test_an_engine_in_another_python(layout: Layout, host: AgentHost, tmp_path: Path) -> None:
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    packages = {"PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])}  # of the fake engine
    host.start(fake_model("tiny", runtime=runtime(python=str(env / "bin/python"), env=packages)))
    host.wait(EngineReady)
    environ = psutil.Process(host.record().pid).environ()
    assert environ["VIRTUAL_ENV"] == str(env)
    assert environ["PATH"].startswith(f"{env}/bin:")
    assert ask(layout, host)


def module_folder(folder: Path) -> Path:
    """Module files of Tcl: one that puts this Python on PATH, and one that fails."""
    (folder / "fake").mkdir(parents=True)
    (folder / "fake/1.0").write_text(
        f"#%Module\nprepend-path PATH {Path(sys.executable).parent}\nsetenv FAKE_LOADED 1\n"
    )
    (folder / "broken").write_text("#%Module\nno-such-command\n")
    return folder


@pytest.mark.skipif(not Path("/etc/profile.d/modules.sh").exists(), reason="no modules (package environment-modules)")
def test_modules_are_loaded_and_a_missing_one_ends_it_in_their_words(
    layout: Layout, host: AgentHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_modules(layout, host, module_folder(tmp_path / "modules"), "Unable to locate a modulefile for 'vllm/9'")


def test_modules_by_a_function_of_the_site(
    layout: Layout, host: AgentHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 3 of Environment Modules: it says that a module is missing, and ends with 0."""
    init = tmp_path / "home/init/bash"
    init.parent.mkdir(parents=True)
    init.write_text(
        "module() { case $1 in use) ;; load) case $2 in fake/1.0)"
        f" export FAKE_LOADED=1 PATH={Path(sys.executable).parent}:$PATH;;"
        """ *) echo "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for '$2'" >&2;; esac;; esac; }\n"""
    )
    monkeypatch.setenv("MODULESHOME", str(tmp_path / "home"))
    monkeypatch.delenv("LMOD_PKG", raising=False)
    check_modules(layout, host, tmp_path, "ERROR:105: Unable to locate a modulefile for 'vllm/9'")


def check_modules(layout: Layout, host: AgentHost, folder: Path, words: str) -> None:
    def of(*modules: str) -> Runtime:
        return runtime(modules=modules, module_folders=[str(folder)])

    host.start(fake_model("tiny", runtime=of("fake/1.0")))
    host.wait(EngineReady)
    environ = psutil.Process(host.record().pid).environ()
    assert environ["FAKE_LOADED"] == "1"
    assert ask(layout, host)
    host.start(fake_model("b", runtime=of("fake/1.0", "vllm/9")), engine="e2")
    exited = host.wait(EngineExited, "e2")
    assert words in exited.reason
