"""The block's real script and program, with a stand-in for Ray that does as each story says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider

from gateway_plugin.blocks import host
from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.leaving import CANCELLED, NO_FOLDER, Leaving, Settings
from gateway_plugin.blocks.ledger import Block
from gateway_plugin.blocks.stop_files import mark_to_leave
from gateway_plugin.paths import Layout, block_folder, block_log
from gateway_plugin.phases import BlockPhase
from gateway_plugin.processes import arguments, carries_mark, own_pids
from gateway_plugin.schedulers.select import scheduler_for
from gateway_plugin.site import NodeType
from tests.support.agents import eventually, own_block
from tests.support.clocks import SLACK
from tests.support.queue import QueueProvider, Scheduler
from tests.support.ray_stand_in import RUNS, STARTS, stand_in

pytestmark = pytest.mark.process

NAME = own_block()

PATIENT = Leaving()
ANY_NODE: Mapping[str, Any] = {}
"""What a site says of it: ``worker_init``, ``node_address``."""

WITHIN_S = 20 * SLACK
"""Within which a block has left."""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    blocks: list[subprocess.Popen[str]] = []
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.make()

    def start(
        ray: str, leaving: Leaving = PATIENT, node: Mapping[str, Any] = ANY_NODE, **environment: str
    ) -> subprocess.Popen[str]:
        python = stand_in(tmp_path, block_folder(layout.run, NAME), ray)
        node_type = NodeType(name="a", provider=QueueProvider(Scheduler()), cpus=1, engine_memory_gib=1, **node)
        script = block_script(NAME, node_type, layout, "127.0.0.1:1", str(python), leaving=leaving)
        env = {**os.environ, **environment}
        # A run of the tests under ``nohup`` ignores SIGHUP; a job does not.
        heard = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731
        argv = ["bash", "-c", script]
        blocks.append(subprocess.Popen(argv, text=True, start_new_session=True, env=env, preexec_fn=heard))
        return blocks[-1]

    yield start
    for process in blocks:
        if process.poll() is None:  # its test failed
            mark(tmp_path)
            process.terminate()
            process.wait(WITHIN_S)


def mark(tmp_path: Path) -> None:
    mark_to_leave(Layout(tmp_path / "state").leave_marks, NAME)


def record(tmp_path: Path, block: str = NAME) -> Path:
    """An engine's record, as its agent writes it."""
    path = Layout(tmp_path / "state").engine_records / f"{block}-engine.json"
    path.write_text(json.dumps({"engine": "e", "block": block, "pid": 1}))
    return path


def has_joined(tmp_path: Path) -> Path:
    """The folder of the block, once Ray runs in it."""
    folder = block_folder(Layout(tmp_path / "state").run, NAME)
    assert eventually((folder / "ray_current_cluster").exists, 20)
    return folder


def calls(tmp_path: Path, what: str) -> int:
    path = tmp_path / "calls"
    return sum(what in line for line in path.read_text().splitlines()) if path.exists() else 0


def said(tmp_path: Path) -> str:
    return block_log(Layout(tmp_path / "state"), NAME).read_text()


def left_cleanly(tmp_path: Path) -> None:
    assert not [pid for pid in own_pids() if carries_mark(pid, NAME)]
    assert not block_folder(Layout(tmp_path / "state").run, NAME).exists()


def test_a_drained_node_leaves_though_ray_stays(tmp_path: Path, block: Start) -> None:
    process = block("{raylet} 1 & " + STARTS + "; wait; exec sleep 300")
    assert process.wait(WITHIN_S) == 0
    assert "gave this node back" in said(tmp_path)
    left_cleanly(tmp_path)


@pytest.mark.parametrize("ends", ["kill -TERM $PPID; exec sleep 300", "kill -TERM $PPID; exit 1", "exit 1"])
def test_a_block_that_is_cancelled_once_its_node_was_drained_has_not_failed(
    tmp_path: Path, block: Start, ends: str
) -> None:
    marks = Layout(tmp_path / "state").leave_marks
    marks.mkdir(parents=True, exist_ok=True)
    process = block("{raylet} 1 & " + STARTS + f"; wait; touch {marks / NAME}; " + ends)
    assert process.wait(WITHIN_S) == 143
    assert "leaving: told to" in said(tmp_path)
    left_cleanly(tmp_path)


def test_a_crashed_node_fails(tmp_path: Path, block: Start) -> None:
    process = block("{raylet} 1 & " + STARTS + "; wait; exit 1")
    assert process.wait(WITHIN_S) == 1
    assert "ended with exit code 1" in said(tmp_path)
    assert calls(tmp_path, "ray.scripts.scripts") == 1
    left_cleanly(tmp_path)


def test_a_full_disk_costs_its_log_and_nothing_else(tmp_path: Path, block: Start) -> None:
    block_log(Layout(tmp_path / "state"), NAME).symlink_to("/dev/full")
    process = block(RUNS)
    folder = has_joined(tmp_path)
    own = record(tmp_path)
    own.with_name("broken.json").write_text("{")
    process.send_signal(signal.SIGTERM)
    assert eventually((folder / "notice").exists)
    own.unlink()
    assert process.wait(WITHIN_S) == CANCELLED
    left_cleanly(tmp_path)


def test_a_notice_that_cannot_be_written_is_said(tmp_path: Path, block: Start) -> None:
    process = block(RUNS, Leaving(notice_s=1))
    folder = has_joined(tmp_path)
    record(tmp_path)
    (folder / ".notice").mkdir()
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED
    assert "its agent gets no notice" in said(tmp_path)
    assert "its notice ends" in said(tmp_path)
    left_cleanly(tmp_path)


def test_an_error_of_its_own_leaves_nothing_behind(tmp_path: Path, block: Start) -> None:
    process = block('rm "$0"; exit 3')  # Ray's interpreter goes away
    assert process.wait(WITHIN_S) == 1
    assert "FileNotFoundError" in said(tmp_path)
    left_cleanly(tmp_path)


def test_ray_that_does_not_start_is_started_once_more(tmp_path: Path, block: Start) -> None:
    assert block("exit 3").wait(WITHIN_S) == 3
    assert calls(tmp_path, "ray.scripts.scripts") == 2
    left_cleanly(tmp_path)


def test_a_node_that_dies_before_it_joined_was_not_given_back(tmp_path: Path, block: Start) -> None:
    assert block("{raylet} 0.7 & wait; exec sleep 300").wait(WITHIN_S) != 0
    assert calls(tmp_path, "ray.scripts.scripts") == 2
    left_cleanly(tmp_path)


def test_told_to_end_by_the_gateway_it_leaves_at_once(tmp_path: Path, block: Start) -> None:
    process = block(RUNS)
    has_joined(tmp_path)
    left = record(tmp_path)  # with an engine on it, as in ``gateway down``
    mark(tmp_path)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED
    assert time.monotonic() - began < 15, "a notice is longer"
    assert "leaving: told to" in said(tmp_path)
    assert left.exists()  # not waited for; it names no process
    left_cleanly(tmp_path)


def test_told_to_end_by_others_it_gives_notice_and_leaves_with_its_last_engine(tmp_path: Path, block: Start) -> None:
    process = block(RUNS)
    folder = has_joined(tmp_path)
    own, other = record(tmp_path), record(tmp_path, "gw-a-99999999")
    process.send_signal(signal.SIGTERM)
    assert eventually((folder / "notice").exists)
    notice = json.loads((folder / "notice").read_text())
    assert 10 < notice["until"] - time.time() <= 20
    assert "cancelled or preempted" in notice["reason"]
    process.send_signal(signal.SIGTERM)  # does no harm
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    own.unlink()
    assert process.wait(WITHIN_S) == CANCELLED
    assert "no engine is left" in said(tmp_path)
    assert other.exists()
    left_cleanly(tmp_path)


def test_told_to_end_by_others_with_nothing_on_it_it_leaves_at_once(tmp_path: Path, block: Start) -> None:
    process = block(RUNS)
    has_joined(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED
    assert "no engine is left" in said(tmp_path)
    left_cleanly(tmp_path)


def test_a_notice_ends_whatever_runs(tmp_path: Path, block: Start) -> None:
    process = block(RUNS, Leaving(notice_s=1))
    has_joined(tmp_path)
    record(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED
    assert "its notice ends" in said(tmp_path)
    left_cleanly(tmp_path)


def test_a_notice_is_cut_short_by_the_gateway(tmp_path: Path, block: Start) -> None:
    process = block(RUNS)
    folder = has_joined(tmp_path)
    record(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert eventually((folder / "notice").exists)
    mark(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED


def test_signalled_ahead_of_its_end_it_gives_notice_and_has_not_failed(tmp_path: Path, block: Start) -> None:
    process = block(RUNS)
    folder = has_joined(tmp_path)
    own = record(tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert eventually((folder / "notice").exists)
    own.unlink()
    assert process.wait(WITHIN_S) == 0
    left_cleanly(tmp_path)


def test_a_mark_alone_is_enough(tmp_path: Path, block: Start) -> None:
    """Slurm gave its job up, and no signal comes any more."""
    process = block(RUNS, Leaving(look_every_s=1))
    has_joined(tmp_path)
    mark(tmp_path)
    assert process.wait(WITHIN_S) == CANCELLED
    left_cleanly(tmp_path)


def test_it_leaves_before_its_walltime_ends(tmp_path: Path, block: Start) -> None:
    process = block(RUNS, Leaving(walltime_s=3600, before_end_s=3598))
    has_joined(tmp_path)
    record(tmp_path)
    assert process.wait(WITHIN_S) == 0
    assert "leaving: its walltime ends" in said(tmp_path)
    left_cleanly(tmp_path)


@pytest.fixture
def slurm_says(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """A ``squeue`` that answers so; gives the environment of a job."""

    def says(answer: str) -> dict[str, str]:
        squeue = tmp_path / "squeue"
        squeue.write_text(f'#!/bin/bash\necho "$SLURM_TIME_FORMAT $*" >>"{tmp_path}/asked"\necho {answer}\n')
        squeue.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}

    return says


def test_it_knows_its_end_from_slurm(tmp_path: Path, block: Start, slurm_says: Callable[[str], dict[str, str]]) -> None:
    process = block(RUNS, Leaving(walltime_s=3600, ask_every_s=5), **slurm_says(f"RUNNING {int(time.time()) + 33}"))
    assert process.wait(WITHIN_S) == 0  # shortened by an administrator
    assert "leaving: its walltime ends" in said(tmp_path)
    assert "%s -h --all -t all -j 77 -o %T %e" in (tmp_path / "asked").read_text()
    left_cleanly(tmp_path)


def test_it_leaves_when_slurm_says_that_its_job_is_over(
    tmp_path: Path, block: Start, slurm_says: Callable[[str], dict[str, str]]
) -> None:
    process = block(RUNS, Leaving(walltime_s=3600, ask_every_s=5), **slurm_says("NODE_FAIL 5"))
    assert process.wait(WITHIN_S) == CANCELLED
    assert "Slurm calls its job NODE_FAIL" in said(tmp_path)
    left_cleanly(tmp_path)


def test_slurm_is_asked_again_after_it_gave_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``squeue`` is a site's wrapper that hangs, and hears signals."""
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    monkeypatch.setattr(host, "ANSWER_S", 0.2)
    squeue, asked, hangs = tmp_path / "squeue", tmp_path / "asked", f"{tmp_path}/hangs"
    squeue.write_text(
        f'#!/bin/bash\ngrep SigBlk /proc/$$/status >>"{asked}"\n'
        f'[ -e "{hangs}" ] || {{ touch "{hangs}"; sleep 300; }}\necho RUNNING 2000000000\n'
    )
    squeue.chmod(0o755)
    settings = Settings(NAME, "127.0.0.1:1", str(tmp_path / "state"), str(tmp_path), leaving=Leaving(walltime_s=3600))
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    block = host.Host(settings, "127.0.0.1", os.getpid(), environ)
    told: list[list[str]] = []
    monkeypatch.setattr(block, "_answered", told.append)

    def answered() -> bool:
        block._watch.ask_at = 0
        block._ask_slurm()
        return bool(told)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        assert eventually(answered, 10)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert told == [["RUNNING", "2000000000"]]
    blocked = [int(line.split()[1], 16) for line in asked.read_text().splitlines()]
    assert len(blocked) > 1
    assert not any(mask >> (number - 1) & 1 for mask in blocked for number in (signal.SIGTERM, signal.SIGUSR1))
    if block._slurm is not None:
        block._slurm.communicate(timeout=10)
    assert not [pid for pid in own_pids() if f"{squeue}" in arguments(pid)]


def test_a_block_without_a_queue_asks_nobody(
    tmp_path: Path, block: Start, slurm_says: Callable[[str], dict[str, str]]
) -> None:
    """The gateway itself may run inside a job, and its local blocks with it."""
    process = block(RUNS, Leaving(ask_every_s=1), **slurm_says("NODE_FAIL 5"))
    has_joined(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    assert not (tmp_path / "asked").exists()


def test_its_gpus_reach_its_agent_and_not_ray(tmp_path: Path, block: Start) -> None:
    writes = 'echo "$GATEWAY_VISIBLE_DEVICES/$CUDA_VISIBLE_DEVICES/$GATEWAY_BLOCK_FOLDER" >"{folder}/../gpus"; '
    process = block(writes + RUNS, CUDA_VISIBLE_DEVICES="2,3")
    folder = has_joined(tmp_path)
    assert (folder.parent / "gpus").read_text() == f"2,3//{folder}\n"
    assert process.poll() is None


def test_what_ray_changes_is_kept_for_its_engines(tmp_path: Path, block: Start) -> None:
    writes = 'echo "$GATEWAY_KEPT_OMP_NUM_THREADS/$GATEWAY_KEPT_LD_PRELOAD" >"{folder}/../kept"; '
    process = block(writes + RUNS, OMP_NUM_THREADS="8")
    folder = has_joined(tmp_path)
    assert (folder.parent / "kept").read_text() == "8/\n"
    assert process.poll() is None


@pytest.fixture
def set_clock(tmp_path: Path) -> Callable[[int], dict[str, str]]:
    """Sets the wall clock of a block by so many seconds. Gives what its environment needs for that."""
    step, site = tmp_path / "step", tmp_path / "site"
    site.mkdir()
    stepped = f"time.time = lambda: told() + float(pathlib.Path({str(step)!r}).read_text())"
    (site / "sitecustomize.py").write_text(f"import pathlib, time\ntold = time.time\n{stepped}\n")

    def to(step_s: int) -> dict[str, str]:
        (tmp_path / "next-step").write_text(f"{step_s}")
        (tmp_path / "next-step").replace(step)  # it is being read all the time
        return {"PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}

    return to


STEPS = pytest.mark.parametrize("step_s", [3, 3600, -3600])
SetClock = Callable[[int], dict[str, str]]


@STEPS
def test_a_notice_lasts_as_long_as_it_says_though_the_clock_is_set(
    tmp_path: Path, block: Start, set_clock: SetClock, step_s: int
) -> None:
    process = block(RUNS, Leaving(notice_s=6), **set_clock(0))
    folder = has_joined(tmp_path)
    record(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert eventually((folder / "notice").exists)
    told = json.loads((folder / "notice").read_text())["until"]
    assert 3 < told - time.time() <= 6  # people and agents read the wall clock
    began = time.monotonic()
    set_clock(step_s)
    assert process.wait(WITHIN_S) == CANCELLED
    assert 3 < time.monotonic() - began < 40
    assert "its notice ends" in said(tmp_path)


@STEPS
def test_its_walltime_does_not_end_because_the_clock_is_set(
    tmp_path: Path, block: Start, set_clock: SetClock, slurm_says: Callable[[str], dict[str, str]], step_s: int
) -> None:
    end = int(time.time()) + 3600
    slurm = {**slurm_says(f"RUNNING {end}"), "SLURM_JOB_END_TIME": f"{end}"}
    process = block(RUNS, Leaving(walltime_s=3600, look_every_s=1), **slurm, **set_clock(0))
    has_joined(tmp_path)
    set_clock(step_s)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    mark(tmp_path)  # looked for every second
    assert process.wait(WITHIN_S) == CANCELLED
    assert "told to by its mark" in said(tmp_path)
    left_cleanly(tmp_path)


def test_an_end_that_slurm_tells_after_the_clock_was_set_counts_from_then(
    tmp_path: Path, block: Start, set_clock: SetClock, slurm_says: Callable[[str], dict[str, str]]
) -> None:
    slurm = slurm_says(f"RUNNING {int(time.time()) + 3600 + 33}")
    process = block(RUNS, Leaving(walltime_s=36000, ask_every_s=5), **slurm, **set_clock(3600))
    assert process.wait(WITHIN_S) == 0
    assert "leaving: its walltime ends" in said(tmp_path)
    left_cleanly(tmp_path)


@pytest.fixture
def patched(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment of a block whose own Python runs these lines first."""

    def first(lines: str) -> dict[str, str]:
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(lines)
        return {"PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}

    return first


HIDDEN = """
import builtins, io
for module in (builtins, io):
    def opened(file, *rest, told=module.open, **named):
        if str(file).startswith("/proc/1/"):
            raise PermissionError(1, "Operation not permitted", str(file))
        return told(file, *rest, **named)
    module.open = opened
"""


def test_it_sees_ray_where_other_users_processes_are_hidden(
    tmp_path: Path, block: Start, patched: Callable[[str], dict[str, str]]
) -> None:
    """``/proc`` mounted with ``hidepid=1``: their folders are listed and what is in them is not to be read."""
    process = block(RUNS, **patched(HIDDEN))
    has_joined(tmp_path)
    mark(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED
    assert "Traceback" not in said(tmp_path)
    left_cleanly(tmp_path)


def test_signals_that_were_ignored_when_it_started_do_not_end_it(tmp_path: Path, block: Start) -> None:
    """As under ``nohup``, and for a job that a shell starts with ``&``: an interrupt is not meant for it."""
    process = block(RUNS, node={"worker_init": "trap '' HUP INT"})
    has_joined(tmp_path)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == CANCELLED
    left_cleanly(tmp_path)


def test_an_interrupt_ends_it_otherwise(tmp_path: Path, block: Start) -> None:
    process = block(RUNS)
    has_joined(tmp_path)
    process.send_signal(signal.SIGHUP)
    assert process.wait(WITHIN_S) == CANCELLED
    left_cleanly(tmp_path)


DURING_IMPORTS = """
import builtins, os, signal
told = builtins.__import__
def imported(name, *rest, **named):
    if name == "gateway_plugin.blocks.leaving":
        builtins.__import__ = told
        os.kill(os.getpid(), signal.SIGUSR1)
    return told(name, *rest, **named)
builtins.__import__ = imported
"""


def test_a_signal_that_comes_while_it_starts_is_not_lost(
    tmp_path: Path, block: Start, patched: Callable[[str], dict[str, str]]
) -> None:
    process = block(RUNS, **patched(DURING_IMPORTS))
    assert process.wait(WITHIN_S) == 0
    assert "signalled ahead of its end" in said(tmp_path)
    left_cleanly(tmp_path)


def test_a_site_s_own_address_may_follow_from_the_head(tmp_path: Path, block: Start) -> None:
    process = block(RUNS, node={"node_address": 'echo "$NAME" >>"$(dirname "$PYTHON")/asked"; echo "${HEAD%:*}"'})
    has_joined(tmp_path)
    assert calls(tmp_path, "--node-ip-address=127.0.0.1 ") == 1
    assert (tmp_path / "asked").read_text() == f"{NAME}\n"
    assert process.poll() is None


def test_a_block_without_the_address_that_its_site_wants_does_not_start(tmp_path: Path, block: Start) -> None:
    """Its default address may be one that the head cannot reach, or a slower network."""
    assert block(RUNS, node={"node_address": "echo no such device >&2; false"}).wait(WITHIN_S) == NO_FOLDER
    assert "node_address= of node type a printed nothing on this node: echo no such" in said(tmp_path)
    assert calls(tmp_path, "") == 0
    left_cleanly(tmp_path)


TRAP = "set -eu; scratch=$(dirname \"$PYTHON\")/scratch; mkdir $scratch; trap 'rmdir $scratch; echo trap $?' EXIT"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, CANCELLED), (signal.SIGUSR1, 0), (signal.SIGHUP, CANCELLED)]
)
def test_what_its_site_wants_done_at_the_end_is_done(tmp_path: Path, block: Start, number: int, code: int) -> None:
    process = block(RUNS, node={"worker_init": TRAP})
    folder = has_joined(tmp_path)
    own = record(tmp_path)
    process.send_signal(number)
    if number != signal.SIGHUP:
        assert eventually((folder / "notice").exists)
        process.send_signal(number)  # does no harm
        assert (tmp_path / "scratch").exists()
        own.unlink()
    assert process.wait(WITHIN_S) == code
    assert calls(tmp_path, f" {process.pid} bash") == 1, "its walltime counts from the start of the script"
    assert not (tmp_path / "scratch").exists()
    assert said(tmp_path).rstrip().endswith("trap 0"), "after all else"
    left_cleanly(tmp_path)


def test_a_trap_of_its_site_does_not_change_its_exit_code(tmp_path: Path, block: Start) -> None:
    assert block("exit 3", node={"worker_init": TRAP}).wait(WITHIN_S) == 3
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("init", ["", TRAP], ids=["becomes its program", "stays"])
def test_a_local_block_is_found_and_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "state")
    layout.make()
    python = stand_in(tmp_path, block_folder(layout.run, NAME), RUNS)
    provider = LocalProvider(launcher=SimpleLauncher())
    node_type = NodeType(name="a", provider=provider, cpus=1, engine_memory_gib=1, worker_init=init)
    jobs = scheduler_for(provider, layout)
    job = jobs.submit(NAME, block_script(NAME, node_type, layout, "127.0.0.1:1", str(python)))
    block = Block(NAME, "a", BlockPhase.RUNNING, 0.0, job)
    try:
        has_joined(tmp_path)
        assert jobs.find(NAME) == job
        jobs.cancel(block, forced=False)
        assert eventually(lambda: jobs.status([block])[NAME].phase is BlockPhase.CANCELLED, 20)
        left_cleanly(tmp_path)
        assert not (tmp_path / "scratch").exists()
    finally:
        jobs.cancel(block, forced=True)
