"""What an engine sees: the words for bubblewrap, and, where there is one, engines that look for secrets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_plugin import isolation
from gateway_plugin.blocks import cleanup
from gateway_plugin.catalog import Model
from gateway_plugin.errors import ServiceError
from gateway_plugin.isolation import Hidden, Isolation, aliases, find_isolation, hidden_here, isolated, wrapper
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.processes import alive, group_members, mark
from serve.core.events import EngineExited, EngineReady
from tests.support.agents import NAMED, AgentHost, engine_client, eventually, fake_model, own_block, private_layout

STATE = Hidden((Path("/h/state"), Path("/run/gw")), (Path("/h/.netrc"),))


def missing() -> str:
    """Why bubblewrap cannot be tried here; ``""`` if it can."""
    with private_layout() as layout:
        return find_isolation(layout).reason


WITHOUT = missing()
needs_bubblewrap = pytest.mark.skipif(bool(WITHOUT), reason=f"no bubblewrap: {WITHOUT}")


@pytest.mark.process
@needs_bubblewrap
def test_before_the_first_up_no_missing_file_is_taken_for_a_missing_bubblewrap(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(0o700)  # 'gateway keys create' made it
    assert find_isolation(Layout(state)).reason == ""


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", own_block())
    with private_layout() as made:
        yield made


def model(**fields: Any) -> Model:
    return Model.model_validate({"name": "m", "source": "org/m", "memory_gib": 1, **fields})


# --- the words ---


def test_hidden_folders_are_emptied_before_anything_is_put_back_and_closed_last() -> None:
    words = wrapper("/usr/bin/bwrap", STATE, [Path("/h/state/node/ca.pem"), Path("/data/m")], [Path("/h/state/hf")])
    assert words == (
        *("/usr/bin/bwrap", "--unshare-user", "--cap-drop", "ALL", "--new-session", "--dev-bind", "/", "/"),
        *("--tmpfs", "/h/state", "--tmpfs", "/run/gw", "--dev-bind", "/dev/null", "/h/.netrc"),
        *("--ro-bind", "/h/state/node/ca.pem", "/h/state/node/ca.pem", "--bind", "/h/state/hf", "/h/state/hf"),
        *("--remount-ro", "/h/state", "--remount-ro", "/run/gw"),
    )


def test_a_hidden_folder_is_never_put_back_itself() -> None:
    assert "--ro-bind" not in wrapper("b", STATE, [Path("/h/state"), Path("/h"), Path("/run")])


MOUNTS = """\
21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / /gpfs rw - gpfs gpfs rw
31 21 0:40 /big /big rw - gpfs gpfs rw
32 21 0:40 /big/ann\\040b /srv/ann rw - gpfs gpfs rw
33 21 0:41 / /other rw - nfs x rw
"""


@pytest.mark.parametrize(
    ("path", "others"),
    [
        ("/big/ann b/state", ("/gpfs/big/ann b/state", "/srv/ann/state")),
        ("/gpfs/big/ann b/state", ("/big/ann b/state", "/srv/ann/state")),
        ("/srv/ann/state", ("/gpfs/big/ann b/state", "/big/ann b/state")),
        ("/gpfs/scratch", ()),
        ("/tmp/x", ()),
    ],
)
def test_every_mount_that_leads_to_a_folder_is_known(path: str, others: tuple[str, ...]) -> None:
    assert aliases(Path(path), MOUNTS) == tuple(Path(other) for other in others)


@pytest.mark.process
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount")
def test_a_second_way_to_the_state_folder_is_closed_too(layout: Layout, tmp_path: Path) -> None:
    (layout.state / "admin.key").write_text("sesame")
    (tmp_path / "again").mkdir()
    if subprocess.run(("mount", "--bind", layout.state.parent, tmp_path / "again"), check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        hidden = hidden_here(layout, tmp_path)
        assert tmp_path / "again" / "state" in hidden.folders
    finally:
        subprocess.run(("umount", tmp_path / "again"), check=True)


def test_what_cannot_be_reached_by_another_mount_is_no_second_way(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for alias in (tmp_path / "none", tmp_path / "file" / "state", tmp_path):
        assert not isolation._leads_to(alias, layout.state)
    assert isolation._leads_to(layout.state.parent / "." / "state", layout.state)


def test_what_lies_below_a_hidden_folder_is_not_hidden_twice(layout: Layout, tmp_path: Path) -> None:
    for name in (".ssh", ".config/gh"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".netrc").touch()
    hidden = hidden_here(layout, tmp_path)
    assert {layout.state, layout.run, tmp_path / ".ssh", tmp_path / ".config/gh"} <= set(hidden.folders)
    assert tmp_path / ".netrc" in hidden.files
    assert not any(hidden.holds(folder) for folder in hidden.folders)
    assert not any((tmp_path / name).exists() for name in (".aws", ".gnupg")), "a place is made by hiding it"


def test_a_site_may_want_it_and_an_entry_may_not(layout: Layout) -> None:
    there, absent = Isolation("/usr/bin/bwrap"), Isolation(reason="there is no bwrap on PATH")
    assert isolated(there, "auto", model(), layout, "org/m", {})[0] == "/usr/bin/bwrap"
    assert isolated(absent, "auto", model(), layout, "org/m", {}) == ()
    assert isolated(there, "off", model(), layout, "org/m", {}) == ()
    assert isolated(there, "auto", model(isolated=False), layout, "org/m", {}) == ()
    with pytest.raises(ServiceError, match="there is no bwrap on PATH"):
        isolated(absent, "required", model(), layout, "org/m", {})
    with pytest.raises(ServiceError, match="isolated: false"):
        isolated(there, "required", model(isolated=False), layout, "org/m", {})


def test_weights_and_caches_below_the_state_folder_are_put_back(layout: Layout) -> None:
    weights, cache = layout.state / "weights", layout.state / "hf"
    cache.mkdir()
    env = {"HF_HOME": str(cache), "PATH": f"{layout.tls}:{layout.edge}", "HOME": "/h"}
    words = isolated(Isolation("bwrap"), "auto", model(), layout, str(weights), env)
    assert words[words.index(str(weights)) - 1] == "--ro-bind"
    assert words[words.index(str(cache)) - 1] == "--bind"
    assert not {str(layout.tls), str(layout.edge), str(layout.node)} & set(words)


def test_of_fetched_weights_the_content_is_shown_and_the_hubs_login_hidden(layout: Layout) -> None:
    home = layout.state / "hf"
    folder = home / "hub" / "models--org--m" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    for name in ("token", "stored_tokens"):
        (home / name).touch()
    env = {"HF_HOME": str(home)}
    words = isolated(Isolation("bwrap"), "auto", model(), layout, str(folder), env)
    shown = folder.parent.parent
    assert words[words.index(str(shown)) - 1 : words.index(str(shown)) + 2] == ("--ro-bind", str(shown), str(shown))
    outside = layout.state.parent / "hf"
    outside.mkdir()
    (outside / "token").touch()
    env = {"HF_HOME": str(outside)}
    for source, hidden in ((str(folder), True), ("org/m", False)):
        words = isolated(Isolation("bwrap"), "auto", model(), layout, source, env)
        assert (str(outside / "token") in words) == hidden


@pytest.mark.process
def test_where_it_is_not_there_it_says_so(layout: Layout) -> None:
    assert "no-such-program" in find_isolation(layout, "no-such-program").reason
    assert find_isolation(layout, "false").reason


# --- engines in it ---


def put_secrets(layout: Layout) -> tuple[Path, ...]:
    """Files with ``sesame`` in them where the gateway keeps its secrets."""
    paths = (
        *(layout.admin_key, layout.keys_json, layout.ca_key, layout.edge_secret, layout.ray_token),
        *(layout.slot_keys_map, layout.agent_identity, layout.edge_identity, layout.run / "engines" / "other"),
    )
    before = {path: path.read_text() for path in paths if path.exists()}
    for path in paths:
        write_private(path, before.get(path, "") + "sesame")
    return paths


def ask(layout: Layout, address: str, prompt: str) -> str:
    with engine_client(layout, address) as client:
        answer = client.post("/v1/completions", json={"prompt": prompt}, extensions=NAMED)
    assert answer.status_code == 200
    return str(answer.json()["choices"][0]["text"])


def wrappers(layout: Layout) -> list[psutil.Process]:
    """bubblewrap's own processes around engines of this gateway."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words[:1] and words[0].endswith("bwrap") and str(layout.state) in words:
            found.append(process)
    return found


@pytest.mark.process
@needs_bubblewrap
def test_an_engine_finds_no_secret_and_answers_all_the_same(layout: Layout) -> None:
    secrets = put_secrets(layout)
    host = AgentHost(layout)
    try:
        host.start(fake_model("tiny", "generate", "--children", "1"))
        address = host.wait(EngineReady).address
        assert ask(layout, address, "hello").startswith("tiny pid=")
        for path in secrets:
            assert path.read_text().endswith("sesame")  # we see it
            assert ask(layout, address, f"@read={path}") in ("FileNotFoundError", "PermissionError"), path
        assert ask(layout, address, f"@read={layout.state}") == "node"
        assert ask(layout, address, f"@read={layout.node}") == "ca.pem engine.crt engine.key"
        with layout.admin_key.open() as opened:  # nor by way of the owner's other processes
            for name in ("environ", "root", "cwd", "mem", f"fd/{opened.fileno()}"):
                assert ask(layout, address, f"@read=/proc/{os.getpid()}/{name}") == "PermissionError", name
        assert len(wrappers(layout)) == 1
    finally:
        host.close()
    assert wrappers(layout) == []


@pytest.mark.process
@needs_bubblewrap
def test_without_it_the_engine_sees_them(layout: Layout) -> None:
    """What the test above would show if nothing were isolated."""
    put_secrets(layout)
    host = AgentHost(layout, isolate="off")
    try:
        host.start(fake_model())
        assert ask(layout, host.wait(EngineReady).address, f"@read={layout.admin_key}") == "sesame"
        assert wrappers(layout) == []
    finally:
        host.close()


@pytest.mark.process
def test_a_site_that_wants_it_starts_no_engine_without(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    for isolate, starts in (("required", False), ("auto", True)):
        host = AgentHost(layout, isolate=isolate)  # type: ignore[arg-type]
        try:
            host.start(fake_model())
            if starts:
                host.wait(EngineReady)
                host.start(fake_model("other"), engine="e2")
                host.wait(EngineReady, engine="e2")
            else:
                exited = host.wait(EngineExited)
                assert not exited.expected
                assert "isolate_engines" in exited.reason
                assert "bubblewrap" in exited.reason
            assert caplog.text.count("engines not isolated node=node1") == 1
            caplog.clear()
        finally:
            host.close()


@pytest.mark.process
@needs_bubblewrap
def test_the_recorded_process_is_the_engine_and_leads_its_session(layout: Layout) -> None:
    host = AgentHost(layout)
    try:
        host.start(fake_model("tiny", "generate", "--load-delay-s", "60"))
        pid = host.record().pid
        (around,) = wrappers(layout)
        assert (os.getsid(pid), os.getpgid(pid), psutil.Process(pid).ppid()) == (pid, pid, around.pid)
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert around.pid not in {known.pid for known in group_members(host.record().mark)}
    finally:
        host.close()


AGENT = """
import sys, time
from pathlib import Path
from gateway_plugin.paths import Layout
from serve.core.events import EngineReady
from tests.support.agents import AgentHost, fake_model
host = AgentHost(Layout(Path(sys.argv[1])))
host.start(fake_model("tiny", "generate", "--children", "1"))
print(host.wait(EngineReady).address, flush=True)
time.sleep(600)
"""


@pytest.mark.process
@needs_bubblewrap
@pytest.mark.parametrize("end", ["stop", "kill", "leave"])
def test_it_outlives_an_agent_killed_with_9_and_ends_as_any_other(layout: Layout, end: str) -> None:
    agent = subprocess.Popen((sys.executable, "-c", AGENT, str(layout.state)), stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    address = agent.stdout.readline().strip()
    agent.kill()
    agent.wait(10)
    agent.stdout.close()
    host = AgentHost(layout)
    try:
        assert host.wait(EngineReady).address == address
        record = host.record()
        assert ask(layout, address, f"@read={layout.node}") == "ca.pem engine.crt engine.key"
        assert len(group_members(record.mark)) == 2
        if end == "stop":
            host.stop()
            assert host.wait(EngineExited).reason == "evicted"
        elif end == "kill":
            os.kill(record.pid, signal.SIGKILL)
            assert not host.wait(EngineExited).expected
        else:
            host.crash()
            assert cleanup.clean_up(layout.engine_records, own_block(), layout.run / "b-a")
        assert group_members(record.mark) == ()
        assert eventually(lambda: wrappers(layout) == [])
        assert list(layout.engine_records.iterdir()) == []
    finally:
        host.close()


@pytest.mark.process
@needs_bubblewrap
def test_its_wrapper_killed_or_stopped_harms_nothing(layout: Layout) -> None:
    host = AgentHost(layout)
    try:
        host.start(fake_model())
        address = host.wait(EngineReady).address
        (around,) = wrappers(layout)
        around.suspend()
        assert ask(layout, address, "hello").startswith("tiny")
        host.stop()
        assert host.wait(EngineExited).expected
        assert wrappers(layout) == []
        host.start(fake_model(), engine="e2")
        address = host.wait(EngineReady, engine="e2").address
        (around,) = wrappers(layout)
        around.kill()
        host.poll(0.3)
        assert ask(layout, address, "hello").startswith("tiny")
    finally:
        host.close()


@pytest.mark.process
@needs_bubblewrap
def test_its_stop_is_as_patient_as_without(layout: Layout) -> None:
    """SIGTERM, then time, then SIGKILL: the wrapper's end is not taken for the leader's."""
    host = AgentHost(layout)
    try:
        host.start(fake_model("tiny", "generate", "--ignore-sigterm"))
        host.wait(EngineReady)
        begun = time.monotonic()
        host.stop()
        host.wait(EngineExited)
        assert time.monotonic() - begun >= host.timing.grace_s
    finally:
        host.close()


@pytest.mark.process
@needs_bubblewrap
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_an_unprivileged_owner_can_still_look_after_it(tmp_path: Path) -> None:
    """In a user namespace of its own a process is closed to its owner's others, and open to those outside."""
    program, nobody = str(shutil.which("bwrap")), 65534
    place = Path(f"/tmp/gwi-{os.getpid()}")
    place.mkdir(mode=0o700)
    (place / "secret").write_text("sesame")
    for path in (place, place / "secret"):
        os.chown(path, nobody, nobody)
    log = place / "log"
    script = 'cat "$1/secret" /proc/"$2"/environ /proc/"$2"/root"$1"/secret; echo looked; exec sleep 60'
    as_nobody: dict[str, Any] = {"user": nobody, "group": nobody, "extra_groups": [], "cwd": "/"}
    other = subprocess.Popen(("sleep", "60"), **as_nobody)
    with log.open("w") as output:
        words = wrapper(program, Hidden((place,)), ())
        argv = (*words, "--", "sh", "-c", script, "sh", str(place), str(other.pid))
        around = subprocess.Popen(argv, stdout=output, stderr=output, start_new_session=True, **as_nobody)
    try:
        assert eventually(lambda: "looked" in log.read_text()), log.read_text()
        assert "sesame" not in log.read_text()
        assert log.read_text().count("Permission denied") == 2
        (inner,) = psutil.Process(around.pid).children()
        known = mark(inner.pid)
        look = ("sh", "-c", f"readlink /proc/{inner.pid}/fd/1; head -c 1 /proc/{inner.pid}/environ | wc -c")
        seen = subprocess.run(look, capture_output=True, text=True, check=True, **as_nobody)
        assert seen.stdout.split() == [str(log), "1"]
        subprocess.run(("kill", str(inner.pid)), check=True, **as_nobody)
        assert around.wait(10) == 128 + signal.SIGTERM
        assert known is not None
        assert not alive(known)
    finally:
        for process in (around, other):
            process.kill()
            process.wait(10)
        shutil.rmtree(place)
