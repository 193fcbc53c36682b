"""Blocks on the gateway's own machine, over Parsl's ``LocalProvider``.

Parsl starts a small shell (the *keeper*: its PID is the job id) which runs the block's script and then writes its exit
code. The keeper's PID and start time identify the job, in this process and after it. A cancel signals the script, not
the keeper: the script cleans up, and the keeper outlives it, so that a missing keeper means that the script has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from parsl.providers import LocalProvider
from parsl.providers.errors import SchedulerMissingArgs, ScriptPathError, SubmitException

from gateway_plugin.blocks.leaving import CANCELLED
from gateway_plugin.blocks.ledger import Block, Job
from gateway_plugin.engine_records import end_engines
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout, block_folder, block_log
from gateway_plugin.phases import BlockPhase
from gateway_plugin.processes import Mark, alive, arguments, block_processes, end, mark, own_pids, parent_pid, terminate
from gateway_plugin.schedulers.base import JobStatus, last_words

HOST = "gateway_plugin.blocks.host"
"""An argument of the block's own process."""


class LocalScheduler:
    """``Scheduler`` of a ``LocalProvider``. ``scripts``: a folder whose path needs no quoting (Parsl does none)."""

    in_doubt_s = 5.0

    def __init__(self, provider: LocalProvider, scripts: Path, layout: Layout) -> None:
        self._provider = provider
        self._scripts = scripts
        self._layout = layout
        provider.script_dir = str(scripts)

    def submit(self, name: str, script: str) -> Job:
        try:
            job_id = self._provider.submit(script, 1, name)
        except (SubmitException, SchedulerMissingArgs, ScriptPathError, OSError) as error:
            raise ServiceError(f"block {name} could not be started: {error}") from None
        pid, script = int(job_id), str(self._provider.resources[job_id]["script_path"])
        keeper = mark(pid, dead_too=True)
        if keeper is None:
            return Job(id=job_id, pid=pid, script=script)  # ended already; its exit code gives the result
        return _job(keeper, script)

    def status(self, blocks: Sequence[Block]) -> Mapping[str, JobStatus]:
        return {block.name: self._status(block.name, block.job) for block in blocks if block.job is not None}

    def _status(self, name: str, job: Job) -> JobStatus:
        if alive(job.mark) or self._script_process(name) is not None:
            return JobStatus(BlockPhase.RUNNING)
        code = _exit_code(job.script)
        if code == 0:
            return JobStatus(BlockPhase.COMPLETED)
        if code == CANCELLED:
            return JobStatus(BlockPhase.CANCELLED)
        if code is not None:
            return JobStatus(
                BlockPhase.FAILED, f"its script left with exit code {code}{last_words(block_log(self._layout, name))}"
            )
        return JobStatus(
            BlockPhase.LOST, "its script is gone without an exit code: killed, or the machine was restarted"
        )

    def find(self, name: str) -> Job | None:
        script = self._script_process(name)
        if script is None:
            return None
        path = arguments(script.pid)[-1:]
        if not path:
            return None  # it ended meanwhile: the next search finds none either
        above = mark(parent_pid(script.pid) or 0)
        return _job(above if above is not None and path[0] in " ".join(arguments(above.pid)) else script, path[0])

    def _script_process(self, name: str) -> Mark | None:
        """The running script of block ``name``, ``bash SCRIPT`` or what it became (``blocks.host ... SCRIPT``); its
        subshells look the same, so the first of them."""
        prefix = f"{self._scripts}/{name}."

        def is_script(line: tuple[str, ...]) -> bool:
            return bool(line) and line[-1].startswith(prefix) and (len(line) == 2 or HOST in line)

        found = [mark(pid) for pid in own_pids() if is_script(arguments(pid))]
        return min((known for known in found if known is not None), key=lambda one: (one.ticks, one.pid), default=None)

    def cancel(self, block: Block, forced: bool) -> None:
        if forced:  # also after a script that was killed: there was no cleanup, and its processes hold memory
            self._clear(block.name)
        elif (script := self._script_process(block.name)) is not None:
            terminate(script)

    def _clear(self, name: str) -> None:
        """Kill all processes of block ``name``: keeper, script, those that carry its mark, and its recorded engines."""

        def found() -> tuple[Mark, ...]:
            script = self._script_process(name)
            shells = () if script is None else (script,)
            return (*shells, *block_processes(name, block_folder(self._layout.run, name)))

        end(found, grace_s=0)
        end_engines(self._layout.engine_records, name)


def _job(keeper: Mark, script: str) -> Job:
    return Job(
        id=str(keeper.pid), pid=keeper.pid, started=keeper.started, script=script, ticks=keeper.ticks, boot=keeper.boot
    )


def _exit_code(script: str | None) -> int | None:
    """The exit code that the keeper wrote; ``None`` while there is none (Parsl writes ``-`` first)."""
    if script is None:
        return None
    try:
        return int(Path(f"{script}.ec").read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return None
