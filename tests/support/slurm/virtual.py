"""A whole Slurm, started and ended by PID; all of it is removed afterwards, and two of them share nothing.

with virtual_slurm() as slurm:
    os.environ["SLURM_CONF"] = str(slurm.places.conf)
    print(slurm.run("sinfo"))
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.clusters import wait_for
from tests.support.ports import free_port
from tests.support.slurm import network
from tests.support.slurm.configuration import (
    DATABASE_SQL,
    Places,
    Shape,
    epilog,
    gres_conf,
    node_name,
    slurm_conf,
    slurmdbd_conf,
)

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server", "iproute2")
"""The required packages in Debian and Ubuntu."""

_COMMANDS = (
    *("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db"),
    *("sbatch", "squeue", "ip", "nsenter", "unshare", "setpriv"),
)
_GRACE_S = 15.0


def missing() -> str | None:
    """Why there can be no virtual Slurm on this machine, and what to do; ``None``: there can."""
    if os.geteuid() != 0:
        return "a virtual Slurm needs root"
    absent = [command for command in _COMMANDS if shutil.which(command) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    return None


class VirtualSlurm:
    """One cluster in a folder of its own."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        ports = {free_port() for _ in range(50)}
        controller, accounting, database, *nodes = list(ports)[: 3 + shape.nodes]
        self.places = Places(
            folder=Path(tempfile.mkdtemp(prefix="gws-", dir="/tmp")),
            token=secrets.token_hex(3),
            host=socket.gethostname().split(".")[0],
            network=network.free_network(),
            controller_port=controller,
            accounting_port=accounting,
            database_port=database,
            node_ports=tuple(nodes),
        )
        self._database: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Everything, until each node has registered with the controller."""
        self._write()
        if self.shape.namespaces:
            network.set_up(self.places, self.shape.nodes)
        self._start_munged()
        if self.shape.accounting:
            self._start_accounting()
        self.start_controller()
        for number in range(1, self.shape.nodes + 1):
            self.start_node(number)
        wait_for(self._registered, f"{self.shape.nodes} nodes to register", timeout_s=30)

    def run(self, *argv: str, check: bool = True) -> str:
        """The output of a Slurm command on this cluster. Raises ``RuntimeError`` with its error message."""
        done = subprocess.run(argv, env=self.env(), capture_output=True, text=True, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def env(self) -> dict[str, str]:
        """This process's environment, with this cluster in it."""
        return {**os.environ, "SLURM_CONF": str(self.places.conf)}

    def start_controller(self, *options: str) -> None:
        """``-c``: without its saved state."""
        self.run("slurmctld", "-f", str(self.places.conf), *options)
        wait_for(lambda: " UP" in self.run("scontrol", "ping", check=False), "slurmctld", timeout_s=30)

    def stop_controller(self) -> None:
        """As on a site whose controller is restarted: jobs go on, commands get no answer."""
        self._end("slurmctld")

    def start_node(self, number: int) -> None:
        """Its network too, if it crashed."""
        argv = ("slurmd", "-N", node_name(number), "-f", str(self.places.conf))
        if self.shape.namespaces:
            network.plug(self.places, number, "up")
        self.run(*(network.inside(self.places, number, *argv) if self.shape.namespaces else argv))

    def kill_node_daemon(self, number: int) -> None:
        """``kill -9`` to a node's slurmd; what runs on the node runs on."""
        pid = self._pid(f"slurmd.{node_name(number)}")
        if pid is None:
            raise RuntimeError(f"{node_name(number)}: no slurmd to kill")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not _runs(pid), "slurmd's end", timeout_s=_GRACE_S)

    def crash_node(self, number: int) -> None:
        """Everything on a node ends at once, slurmd too, and no connection is closed, as when its power is cut."""
        if not self.shape.namespaces:
            raise RuntimeError("what runs on a node is known by its namespace: this cluster has none")
        network.plug(self.places, number, "down")
        network.kill_all(self.places, number)

    def repair(self) -> None:
        """Undo what a test that failed in the middle may have left: start absent daemons, resume nodes."""
        if self._pid("slurmctld") is None:
            self.start_controller()
        for number in range(1, self.shape.nodes + 1):
            if self._pid(f"slurmd.{node_name(number)}") is None:
                self.start_node(number)
            if not self._usable(number):  # rejected if there is nothing to resume from: it has a job, for example
                self.run("scontrol", "update", f"nodename={node_name(number)}", "state=resume", check=False)
        self.run("scontrol", "update", "partitionname=debug", "state=up")

    def clear(self) -> None:
        """Cancel every job and wait for the queue to be empty and every node to be up again."""
        self.repair()  # first: without its controller Slurm lists no job
        jobs = self.run("squeue", "-h", "--all", "-o", "%A").split()
        if jobs:
            self.run("scancel", "--quiet", *jobs, check=False)
        wait_for(lambda: not self.run("squeue", "-h", "--all"), "an empty queue", timeout_s=45)
        wait_for(self._registered, "all nodes to be up", timeout_s=30)

    def stop(self) -> None:
        """End every job and daemon, remove namespaces and folder, in any state."""
        if self._pid("slurmctld") is not None:
            with contextlib.suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
                self.clear()
        nodes = [f"slurmd.{node_name(number)}" for number in range(1, self.shape.nodes + 1)]
        for daemon in (*nodes, "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(daemon)
        if self._database is not None:
            self._database.wait(_GRACE_S)
        if self.shape.namespaces:
            network.take_down(self.places, self.shape.nodes)
        self._end_leftovers()
        shutil.rmtree(self.places.folder)

    def _write(self) -> None:
        places, folder = self.places, self.places.folder
        folder.chmod(0o755)  # munge and mariadbd run as users of their own
        for name in ("etc", "log", "run", "state", "munge", "db", "dev"):
            (folder / name).mkdir(mode=0o755)
        for number in range(1, self.shape.nodes + 1):
            (folder / "spool" / node_name(number)).mkdir(parents=True)
        places.conf.write_text(slurm_conf(self.shape, places))
        (folder / "etc" / "gres.conf").write_text(gres_conf(self.shape, places))
        places.epilog.write_text(epilog(places, sys.executable))
        places.epilog.chmod(0o755)
        for number in range(self.shape.gpus):  # character devices that do nothing, with the right names
            os.mknod(folder / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3 + 2 * number))

    def _start_munged(self) -> None:
        """With its own key and socket: a site's /etc/munge is never touched."""
        folder = self.places.folder / "munge"
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        files = {
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        socket_option = f"--socket={self.places.munge_socket}"
        self.run(*_as("munge"), "munged", socket_option, *options, "--num-threads=2")
        wait_for(self.places.munge_socket.exists, "munged", timeout_s=10)

    def _start_accounting(self) -> None:
        places, folder = self.places, self.places.folder / "db"
        shutil.chown(folder, "mysql", "mysql")
        data, door = folder / "data", folder / "mariadb.sock"
        unused = ("--skip-test-db", "--auth-root-authentication-method=normal")
        self.run("mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={data}", *unused)
        small = ("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--performance-schema=OFF")
        with open(places.log("mariadbd"), "wb") as log:
            self._database = subprocess.Popen(
                (
                    *(*_as("mysql"), "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={door}"),
                    *(f"--pid-file={places.pid_file('mariadbd')}", "--bind-address=127.0.0.1"),
                    *(f"--port={places.database_port}", *small, "--innodb-lock-wait-timeout=900"),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = ("mariadb", "--no-defaults", "-S", str(door), "-e")
        wait_for(lambda: self._answers(*client, "select 1"), "mariadbd", timeout_s=30)
        self.run(*client, DATABASE_SQL)
        conf = places.folder / "etc" / "slurmdbd.conf"
        conf.write_text(slurmdbd_conf(places))
        conf.chmod(0o600)
        self.run("slurmdbd")
        wait_for(lambda: self._answers("sacctmgr", "-n", "-i", "list", "cluster"), "slurmdbd", timeout_s=30)
        for words in (("cluster", "virtual"), ("account", "proj"), ("user", "root", "Account=proj")):
            self.run("sacctmgr", "-Q", "-i", "add", *words)

    def _answers(self, *argv: str) -> bool:
        return subprocess.run(argv, env=self.env(), capture_output=True, timeout=20).returncode == 0

    def _usable(self, number: int) -> bool:
        """Idle and registered: Slurm also reports "idle" for an unregistered node until its first ping fails."""
        said = self.run("scontrol", "-o", "show", "node", node_name(number), check=False)
        return "State=IDLE " in said and "SlurmdStartTime=2" in said

    def _registered(self) -> bool:
        return all(self._usable(number) for number in range(1, self.shape.nodes + 1))

    def _pid(self, daemon: str) -> int | None:
        """Of a live daemon that is ours; a zombie is not alive."""
        try:
            process = psutil.Process(int(self.places.pid_file(daemon).read_text()))
            alive = process.status() != psutil.STATUS_ZOMBIE and process.name() == daemon.split(".")[0]
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None
        return process.pid if alive else None

    def _end(self, daemon: str) -> None:
        pid = self._pid(daemon)
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self._pid(daemon) is None and not _runs(pid), daemon, timeout_s=_GRACE_S)
            return
        os.kill(pid, signal.SIGKILL)

    def _end_leftovers(self) -> None:
        """Kill what a daemon left: ``slurmstepd`` and its job, where they outlived it."""
        own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        conf = f"{self.places.folder}/"
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                ours = process.environ().get("SLURM_CONF", "").startswith(conf)
                if process.pid not in own and (ours or conf in " ".join(process.cmdline())):
                    process.kill()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _as(user: str) -> tuple[str, ...]:
    return ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")


@contextlib.contextmanager
def virtual_slurm(shape: Shape | None = None) -> Iterator[VirtualSlurm]:
    """A running cluster; nothing is left of it afterwards."""
    slurm = VirtualSlurm(shape or Shape())
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
