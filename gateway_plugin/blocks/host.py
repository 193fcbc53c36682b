"""What runs in a block's job: start Ray, watch it, and leave nothing behind. ``python -m gateway_plugin.blocks.host``.

The job's script (``job_script.py``) sets up the environment and becomes this process, so that it has the script's PID
and its signals; or the script stays its parent, and passes them on. When Ray is gone the block leaves at once, because
``ray start --block`` does not: an allocation would be held to its walltime.

It leaves (1) when Ray released the node; (2) when the gateway cancelled it, or reports that its job has ended: a mark
with its name lies in the state folder; (3) ``before_end_s`` before its walltime ends; (4) cancelled by others, once no
engine is left on it, at the latest ``notice_s`` later: meanwhile a notice lies in its folder for the agent.

What ``scancel``, a preemption and the walltime do to it, seen on Slurm 22.05 (``tests/slurm/test_leaving.py``): SIGCONT
and SIGTERM come together, SIGKILL follows after the site's ``KillWait``, for any signal given to ``scancel``. A batch
script gets no signal at the start of a partition's ``GraceTime``: it is over when SIGTERM comes (a job with
``--signal=B:USR1@60`` gets SIGUSR1, where the cluster has ``PreemptParameters=send_user_signal``). Under
``proctrack/cgroup``, Slurm's default, SIGTERM reaches this process alone and SIGKILL all that the job started.
``proctrack/pgid`` signals its process group: so Ray runs in a session of its own. ``proctrack/linuxproc`` signals every
process at once, engines too: there is nothing left to drain.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # At once: the imports below take a while, seconds from a busy shared file system, and one of these would end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP))

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from gateway_plugin.blocks.cleanup import clean_up
from gateway_plugin.blocks.leaving import CANCELLED, NO_FOLDER, Settings, Watch
from gateway_plugin.blocks.ray_tls import tls_environment
from gateway_plugin.blocks.self_check import report
from gateway_plugin.errors import GatewayError
from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout, block_folder, write_private
from gateway_plugin.processes import Mark, age_s, alive, child, mark

RAY_STOP_GRACE_S = 10
"""How long Ray has to end in a block before it is killed."""

ANSWER_S = 60.0
"""How long ``squeue`` may take: a hung one must not be the last question."""
POLL_S = 0.5
CALLED_S = 15.0
"""How long a node that looks at itself waits to be called."""
_CRASH_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_OVER = frozenset(
    {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL"}
    | {"OUT_OF_MEMORY", "REVOKED"}
)
_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_KEPT = ("OMP_NUM_THREADS", "LD_PRELOAD")


class _Leave(Exception):
    """The block leaves: why, and its exit code."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


class Host:
    """One block on its node: processes, files and signals around ``Watch``."""

    def __init__(self, settings: Settings, address: str, script: int, environ: Mapping[str, str]) -> None:
        """Make its folder. ``script``: PID of the job's script. Raises ``GatewayError``, ``OSError``: no place."""
        self._settings = settings
        self._layout = Layout.of(Path(settings.state))
        run = private_folder(self._layout.run)
        self._records = self._layout.engine_records
        self._folder = block_folder(run, settings.name)
        for folder in (self._records, self._folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._address = address or _address_to(settings.head)
        self._environ = environment(settings, self._folder, environ)
        self._job = environ.get("SLURM_JOB_ID")
        self._ray: subprocess.Popen[bytes] | None = None
        self._raylet: Mark | None = None
        self._slurm: subprocess.Popen[str] | None = None
        self._slurm_until = 0.0
        self._watch = Watch(settings.leaving)
        started = mark(script)
        now = time.monotonic()
        if settings.leaving.walltime_s is not None:
            # It counts from the start of the job's script, worker_init included.
            self._watch.ends = now - (age_s(started) if started is not None else 0) + settings.leaving.walltime_s
            if (end := environ.get("SLURM_JOB_END_TIME", "")).isdigit():
                self._watch.told_end(int(end), now, time.time())
        self._watch.look_at = now
        self._watch.ask_at = now + random.uniform(0, settings.leaving.ask_every_s / 10)  # noqa: S311

    def run(self) -> int:
        """Until the block leaves. Returns the exit code of its job."""
        say(f"block {self._settings.name} on {socket.gethostname()}, head {self._settings.head}")
        try:
            self._run_ray()
        except _Leave as leave:
            say(f"leaving: {leave}")
            return leave.code
        finally:  # nothing of the block may outlive it
            self._end_ray()
            clean_up(self._records, self._settings.name, self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run_ray(self) -> NoReturn:
        """Until there is a reason to leave. Ray's node gives up where its helpers take 15 s to import, as they may the
        first time: it is started once more."""
        joined = self._folder / "ray_current_cluster"
        for _ in range(2):
            joined.unlink(missing_ok=True)
            self._ray = ray = self._start_ray()
            seen = False
            while ray.poll() is None:
                if self._raylet_runs():
                    seen = True
                elif joined.exists():
                    # Drained: ray start stays, and would for ever. Crashed: it notices within a second, and ends.
                    if self._comes_back():
                        continue
                    if ray.poll() is None:
                        raise _Leave("Ray gave this node back", 0)
                    break
                elif seen:
                    self._end_ray()  # it would wait on, for a node that is gone
                    break
                self._look()
                self._wait(POLL_S)
            code = _exit_code(ray.wait())
            self._wait(0)  # a block that is cancelled may lose Ray's node first
            if self._marked():
                raise _Leave("told to by its mark", CANCELLED)
            if self._watch.until is not None:
                raise _Leave("told to, and so was Ray", self._watch.code)
            if joined.exists():
                break
            say(f"Ray did not start, exit code {code}")
        raise _Leave(f"ray start ended with exit code {code}", code or 1)

    def _start_ray(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        own = (f"--address={settings.head}", f"--node-ip-address={self._address}", f"--temp-dir={self._folder}")
        argv = (settings.python, "-m", "ray.scripts.scripts", "start", "--block", *own, *settings.ray)
        self._raylet = None
        return subprocess.Popen(argv, env=self._environ, start_new_session=True, preexec_fn=_hear_signals)

    def _raylet_runs(self) -> bool:
        """Whether Ray's own process for this node, a child of ``ray start``, is there."""
        if self._raylet is None and self._ray is not None:
            self._raylet = child(self._ray.pid, "raylet")
        return alive(self._raylet)

    def _comes_back(self) -> bool:
        """Whether a raylet that is not there is, within a while, and Ray with it."""
        until = time.monotonic() + _CRASH_S
        self._raylet = None
        while time.monotonic() < until and self._ray is not None and self._ray.poll() is None:
            if self._raylet_runs():
                return True
            self._wait(0.1)
        return False

    def _end_ray(self) -> None:
        if self._ray is None or self._ray.poll() is not None:
            return
        self._ray.terminate()
        try:
            self._ray.wait(RAY_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._ray.kill()
            self._ray.wait()

    def _wait(self, seconds: float) -> None:
        """For a signal, or ``seconds``. Signals are blocked otherwise: none is lost, and none interrupts."""
        received = signal.sigtimedwait(_heard(), seconds)
        if received is None:
            return
        if received.si_signo == signal.SIGUSR1:
            self._notice("signalled ahead of its end", 0)
        elif received.si_signo != signal.SIGTERM or self._marked():
            raise _Leave("told to", CANCELLED)
        else:
            self._notice("cancelled or preempted by others than the gateway", CANCELLED)

    def _notice(self, why: str, code: int) -> None:
        """The block's agent passes it on to the controller, which has this long to drain the engines."""
        if not self._watch.give_notice(code, time.monotonic()):
            return
        notice_s = self._settings.leaving.notice_s
        say(f"{why}: leaving within {notice_s:.0f} s")
        new = self._folder / ".notice"
        try:
            new.write_text(json.dumps({"until": int(time.time() + notice_s), "reason": why}), encoding="utf-8")
            new.replace(self._folder / "notice")
        except OSError as error:
            say(f"its agent gets no notice: {error}")
        self._look()

    def _look(self) -> None:
        """Raises ``_Leave`` if it is time to."""
        self._ask_slurm()
        reason = self._watch.reason(time.monotonic(), self._marked, self._engines)
        if reason is not None:
            raise _Leave(*reason)

    def _ask_slurm(self) -> None:
        """In the background: a controller that is away must not delay a signal."""
        if self._watch.ends is None or self._job is None:
            return
        if self._slurm is not None and self._slurm.poll() is not None:
            slurm, self._slurm = self._slurm, None
            with slurm:
                if slurm.returncode == 0:
                    self._answered(slurm.communicate()[0].split())
        elif self._slurm is not None and time.monotonic() >= self._slurm_until:
            with suppress(OSError):
                os.killpg(self._slurm.pid, signal.SIGKILL)
        if self._slurm is None and time.monotonic() >= self._watch.ask_at:
            self._watch.asked(time.monotonic(), random.random())  # noqa: S311
            self._slurm_until = time.monotonic() + ANSWER_S
            argv = ("squeue", "-h", "--all", "-t", "all", "-j", self._job, "-o", "%T %e")
            env = {**self._environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
            with suppress(OSError):  # there is no squeue on this node: its walltime counts
                self._slurm = subprocess.Popen(
                    argv,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                    preexec_fn=_hear_signals,
                )

    def _answered(self, said: list[str]) -> None:
        state, end = (*said, "", "")[:2]
        if state in _OVER:  # slurmd died, and what it had started still runs
            raise _Leave(f"Slurm calls its job {state}", CANCELLED)
        now = time.monotonic()
        if end.isdigit() and self._watch.told_end(int(end), now, time.time()):
            say(f"its walltime ends in {(self._watch.ends or now) - now:.0f} s")

    def _marked(self) -> bool:
        marks = self._layout.leave_marks
        with suppress(OSError):  # the file system is away: the next look says
            os.scandir(marks).close()  # opening the folder makes a client of NFS ask its server again
            return (marks / self._settings.name).exists()
        return False

    def _engines(self) -> bool:
        """Whether an engine of this block's is recorded."""
        own = f'"block": "{self._settings.name}"'
        for record in self._records.glob("*.json"):
            with suppress(OSError):  # removed meanwhile
                if own in record.read_text(encoding="utf-8", errors="replace"):
                    return True
        return False


def environment(settings: Settings, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Of Ray and all that runs in the block, whose own folder is ``folder``. ``environ``: of this process. Pure."""
    # Which GPUs are this block's is for its engines to know. Ray would refuse to start where there are fewer than the
    # node type says, and hides them from an actor that asks for none.
    gpus = next((environ[name] for name in _GPUS if environ.get(name)), "")
    kept = {name: value for name, value in environ.items() if name not in _GPUS}
    return {
        **kept,
        **settings.environment,
        **tls_environment(folder / "tls"),
        "GATEWAY_STATE": settings.state,
        "GATEWAY_RUN_ROOT": settings.run_root,
        "GATEWAY_VISIBLE_DEVICES": gpus,
        "GATEWAY_BLOCK_FOLDER": str(folder),
        # Ray changes these for its workers, and an engine is none (serve/agent/argv.py).
        **{f"GATEWAY_KEPT_{name}": environ.get(name, "") for name in _KEPT},
    }


def say(words: str) -> None:
    """A line of the block's log. A full disk costs the line and not the block."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{time.strftime('%FT%T%z')} {words}\n".encode())


def _heard() -> tuple[signal.Signals, ...]:
    """The signals that end a block. SIGINT and SIGHUP only where they were not ignored when it started: ``nohup`` does
    that, and a shell for what it starts with ``&``, as Parsl does on the gateway's own machine."""
    asked = (one for one in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN)
    return (signal.SIGTERM, signal.SIGUSR1, *asked)


def _hear_signals() -> None:
    """In a child before it becomes a program: it would inherit that signals are blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _exit_code(code: int) -> int:
    """As a shell has it."""
    return 128 - code if code < 0 else code


def _address_to(head: str) -> str:
    """This node's address on the way to the head. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head.rsplit(":", 1)[0], 9))
        address: str = probe.getsockname()[0]
        return address


def _check_itself(settings: Settings, address: str) -> int:
    """``gateway doctor --submit``: look at the node, write the report, and be there to be called for a while."""
    with socket.create_server(("", 0)) as called:
        found = report(settings, address, called.getsockname()[1], os.environ)
        write_private(Path(settings.report), json.dumps(found))
        called.settimeout(CALLED_S)
        with suppress(TimeoutError):  # then the report is read, and says where to call
            called.accept()[0].close()
    return 0


def main(argv: list[str]) -> int:
    """Command line: ``SETTINGS ADDRESS PID SCRIPT``: ``Settings.text()``, this node's address if the site's expression
    gave one, PID and path of the job's script, by which a local block is found. Returns the job's exit code."""
    settings = Settings.parse(argv[0])
    os.environ["GATEWAY_RUN_ROOT"] = settings.run_root
    try:
        if settings.report:
            _hear_signals()  # nothing is left behind
            return _check_itself(settings, argv[1] or _address_to(settings.head))
        host = Host(settings, argv[1], int(argv[2]), os.environ)
    except (GatewayError, OSError) as error:
        say(f"no place for a block here: {error.message if isinstance(error, GatewayError) else error}")
        return NO_FOLDER
    return host.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
