"""``qsub``, ``qstat``, ``qselect`` and ``qdel`` without a PBS: jobs are processes of this machine.

It is called by the name of the command, with ``PBS_STANDIN`` naming the folder of its state, and answers with the texts
and exit codes of OpenPBS's own sources: its flaws too (invalid JSON, times in the caller's time zone, no output and
exit code 0 for a history that is not kept). ``keep`` supervises one job.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SERVER = "standin-pbs-01"
UNKNOWN_JOB, UNKNOWN_QUEUE, NO_SERVER = 15001 & 0xFF, 15018 & 0xFF, 255
DELETED, FINISHED, FAILED = 91, 92, 93
_DIRECTIVE = re.compile(r"#PBS\s+(-\w)\s*(.*)")

Job = dict[str, Any]


def folder() -> Path:
    return Path(os.environ["PBS_STANDIN"])


def settings() -> dict[str, Any]:
    """``slots`` jobs run at a time; ``history``; ``away``; ``banner``: extra output of qsub; ``queues``: limits."""
    loaded: dict[str, Any] = json.loads((folder() / "settings.json").read_text())
    return loaded


@contextlib.contextmanager
def jobs() -> Iterator[dict[str, Job]]:
    """All jobs by number, to be changed by one process at a time."""
    with open(folder() / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder() / "jobs.json"
        known: dict[str, Job] = json.loads(file.read_text()) if file.exists() else {}
        yield known
        file.with_suffix(".new").write_text(json.dumps(known))
        file.with_suffix(".new").rename(file)


def seconds(text: str) -> int:
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return total


def clock(total: float) -> str:
    return f"{int(total) // 3600:02}:{int(total) // 60 % 60:02}:{int(total) % 60:02}"


def fail(words: str, code: int) -> int:
    print(words, file=sys.stderr)
    return code


def qsub(arguments: list[str]) -> int:
    options = dict(zip(arguments[:-1:2], arguments[1:-1:2], strict=True))
    asked: dict[str, str] = {}
    prefix = os.environ.get("PBS_DPREFIX", "#PBS")
    for line in Path(arguments[-1]).read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith(prefix) and (found := _DIRECTIVE.fullmatch(line.strip())):
            if found[1] == "-l":
                asked |= dict(part.split("=", 1) for part in found[2].split(",") if "=" in part)
            else:
                options.setdefault(found[1], found[2])
    name = options.get("-N", Path(arguments[-1]).name)
    if len(name) > 236 or not name[0].isalpha():
        return fail("qsub: illegal -N value", 2)
    limits = settings()["queues"].get(options.get("-q", "workq"))
    if limits is None:
        return fail("qsub: Unknown queue", UNKNOWN_QUEUE)
    walltime = asked.get("walltime", "01:00:00")
    if seconds(walltime) > seconds(limits["walltime"]) or int(asked.get("select", "1").split(":")[0]) < limits["nodes"]:
        return fail("qsub: Job violates queue and/or server resource limits", 188)
    with jobs() as known:
        number = str(len(known) + 1)
        known[number] = {
            "Job_Name": name,
            "Job_Owner": f"{getpass.getuser()}@login",
            "job_state": "Q",
            "queue": options.get("-q", "workq"),
            "substate": 10,
            "qtime": int(time.time()),
            "Resource_List": {"walltime": walltime, "select": asked.get("select", "1")},
            "Rerunable": "False" if options.get("-r") == "n" else "True",
            "script": Path(arguments[-1]).read_text(),
            "out": options.get("-o", f"{number}.o"),
            "err": options.get("-e", f"{number}.e"),
        }
    print(settings()["banner"], end="")
    print(f"{number}.{SERVER}")
    subprocess.Popen(
        [sys.executable, "-E", "-S", __file__, "keep", number],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return 0


def keep(number: str) -> int:
    """Wait for a slot, run the job in a session of its own, end it at its walltime, note how it ended."""
    with jobs() as known:
        known[number]["keeper"] = os.getpid()
    while not _started(number):
        with jobs() as known:
            if known[number]["job_state"] != "Q":
                return 0
        time.sleep(0.05)
    with jobs() as known:
        job = dict(known[number])
    script = folder() / f"{number}.SC"
    script.write_text(job["script"])
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment |= {"PBS_JOBID": f"{number}.{SERVER}", "PBS_ENVIRONMENT": "PBS_BATCH"}
    with open(job["out"], "wb") as out, open(job["err"], "wb") as err:
        process = subprocess.Popen(
            ["bash", str(script)], cwd=folder(), env=environment,
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
    with jobs() as known:
        known[number]["session_id"] = process.pid
    until, killed_at, out_of_time = time.time() + seconds(job["Resource_List"]["walltime"]), None, False
    while process.poll() is None:
        with jobs() as known:
            deleted = known[number]["substate"] == DELETED
        if (deleted or time.time() > until) and killed_at is None:
            killed_at, out_of_time = time.time(), not deleted
            _kill(process.pid, signal.SIGTERM)
        elif killed_at is not None and time.time() - killed_at > settings()["kill_delay_s"]:
            _kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    _kill(process.pid, signal.SIGKILL)
    status = 256 - process.returncode if process.returncode < 0 else process.returncode
    with jobs() as known:
        _end(known[number], -29 if out_of_time else status)
    return 0


def _started(number: str) -> bool:
    with jobs() as known:
        running = sum(job["job_state"] == "R" for job in known.values())
        if known[number]["job_state"] != "Q" or running >= settings()["slots"]:
            known[number]["comment"] = "Not Running: Insufficient amount of resource: ngpus"
            known[number]["estimated"] = {"start_time": int(time.time()) + 600}
            return False
        now = int(time.time())
        where = {"exec_host": "node1/0*2", "exec_vnode": "(node1:ncpus=2)", "session_id": 0}
        comment = f"Job run at {time.ctime(now)} on (node1:ncpus=2)"
        known[number].update(job_state="R", substate=42, stime=now, comment=comment, **where)
        return True


def _end(job: Job, status: int | None) -> None:
    word = "terminated" if job["substate"] == DELETED else "finished" if status == 0 else "failed"
    if job["substate"] != DELETED:
        job["substate"] = FINISHED if status == 0 else FAILED
    job.update(job_state="F", obittime=int(time.time()), comment=f"{job.get('comment', 'Job')} and {word}")
    if status is not None:
        used = clock(time.time() - job["stime"])
        job.update(Exit_status=status, resources_used={"walltime": used, "ncpus": 2, "mem": "9692kb"})


def _kill(session: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def qdel(arguments: list[str]) -> int:
    forced = arguments[:2] == ["-W", "force"]
    code = 0
    for job_id in arguments[2 if forced else 0 :]:
        with jobs() as known:
            job = known.get(job_id.partition(".")[0])
            if job is None:
                code = fail(f"qdel: Unknown Job Id {job_id}", UNKNOWN_JOB)
            elif job["job_state"] == "F":
                code = fail(f"qdel: Job has finished {job_id}", 139)
            else:
                job["substate"] = DELETED
                if job["job_state"] == "Q" or forced:
                    _end(job, None if job["job_state"] == "Q" else 265)
                if forced and job.get("session_id"):
                    _kill(job["session_id"], signal.SIGKILL)
    return code


def qselect(arguments: list[str]) -> int:
    history = "-x" in arguments
    if history and not settings()["history"]:
        return fail("qselect: job_history_enable is set to false", 0)
    user = arguments[arguments.index("-u") + 1]
    with jobs() as known:
        for number, job in known.items():
            if job["Job_Owner"].startswith(f"{user}@") and (history or job["job_state"] != "F"):
                print(f"{number}.{SERVER}")
    return 0


def qstat(arguments: list[str]) -> int:
    if "-Q" in arguments:
        return _queues([word for word in arguments if word not in ("-Q", "-f", "-F", "json")])
    history = "-x" in arguments
    operands = [word for word in arguments if word not in ("-x", "-f", "-F", "json")]
    document: dict[str, Any] = {"timestamp": int(time.time()), "pbs_version": "23.06.06", "pbs_server": SERVER}
    if history and not settings()["history"]:
        print(json.dumps(document, indent=4))
        return fail("qstat: job_history_enable is set to false", 0)
    code = 0
    shown = {}
    with jobs() as known:
        for operand in operands:
            number = operand.partition(".")[0]
            job = known.get(number)
            if job is None or (job["job_state"] == "F" and not settings()["history"]):
                code = fail(f"qstat: Unknown Job Id {number}.{SERVER}", UNKNOWN_JOB)
            elif job["job_state"] == "F" and not history:
                code = fail(f"qstat: {number}.{SERVER} Job has finished, use -x or -H to obtain ...", 139)
            else:
                shown[f"{number}.{SERVER}"] = _as_shown(job)
    if shown:
        document["Jobs"] = shown
    # As OpenPBS prints it: values of the environment are not escaped, and digits become numbers (005).
    print(json.dumps(document, indent=4).replace("@BACKSLASH@", "\\").replace('"@DIGITS@"', "005"))
    return code


def _as_shown(job: Job) -> Job:
    shown = {key: value for key, value in job.items() if key not in ("script", "out", "err", "keeper")}
    for key in ("stime", "qtime"):
        if key in shown:
            shown[key] = time.ctime(shown[key])
    if "estimated" in shown:
        shown["estimated"] = {"start_time": time.ctime(shown["estimated"]["start_time"])}
    shown["Variable_List"] = {"PBS_O_HOME": "/users/u", "PROMPT": "@BACKSLASH@h@BACKSLASH@,x", "COUNT": "@DIGITS@"}
    return shown


def _queues(names: list[str]) -> int:
    shown = {}
    for name in names:
        limits = settings()["queues"].get(name)
        if limits is None:
            return fail(f"qstat: Unknown queue {name}", UNKNOWN_QUEUE)
        shown[name] = {
            "queue_type": "Execution",
            "total_jobs": 0,
            "resources_max": {"walltime": limits["walltime"]},
            "resources_min": {"nodect": limits["nodes"]},
            "enabled": str(limits.get("enabled", True)),
            "started": "True",
        }
    print(json.dumps({"timestamp": 0, "pbs_version": "23.06.06", "pbs_server": SERVER, "Queue": shown}, indent=4))
    return 0


def main(name: str, arguments: list[str]) -> int:
    if name == "keep":
        return keep(arguments[0])
    if settings()["away"]:
        return fail(f"{name}: cannot connect to server {SERVER} (errno=15010)", NO_SERVER)
    return {"qsub": qsub, "qstat": qstat, "qselect": qselect, "qdel": qdel}[name](arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
