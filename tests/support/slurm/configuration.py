"""The text of a virtual Slurm's configuration. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """The cluster: the number of nodes, all alike, and their resources."""

    nodes: int = 2
    cpus: int = 2
    """Of one node, as Slurm counts them; may be more than there are."""
    memory_mib: int = 4096
    gpus: int = 4
    """Fake ones of one node: Slurm gives them to jobs and sets CUDA_VISIBLE_DEVICES, no driver opens them."""
    namespaces: bool = True
    """Each node in a network namespace of its own, with its own host name and address."""
    accounting: bool = True
    """With ``slurmdbd`` over a private MariaDB, so that ``sacct`` works."""


@dataclass(frozen=True)
class Places:
    """Where one virtual Slurm lives: nothing of it is shared with another one on the same machine."""

    folder: Path
    token: str
    """Part of every name that the whole machine sees; at most six characters (interface names end at 15)."""
    host: str
    """This machine's host name, where the controller runs."""
    network: str
    """The first three numbers of the nodes' addresses."""
    controller_port: int
    accounting_port: int
    database_port: int
    node_ports: tuple[int, ...]

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge" / "munge.socket"

    @property
    def gateway(self) -> str:
        """The bridge's address: how nodes reach this machine."""
        return f"{self.network}.254"

    @property
    def bridge(self) -> str:
        return f"gws{self.token}br"

    def namespace(self, number: int) -> str:
        return f"gws{self.token}-{number}"

    def link(self, number: int) -> str:
        return f"gws{self.token}v{number}"

    @property
    def epilog(self) -> Path:
        """What every node runs when a job is over."""
        return self.folder / "etc" / "epilog"

    def pid_file(self, daemon: str) -> Path:
        """Of ``munged``, ``mariadbd``, ``slurmdbd``, ``slurmctld`` or ``slurmd.nK``."""
        own = {"munged": "munge/munged.pid", "mariadbd": "db/mariadbd.pid"}
        return self.folder / own.get(daemon, f"run/{daemon}.pid")

    def log(self, daemon: str) -> Path:
        return self.folder / "log" / f"{daemon}.log"


def node_name(number: int) -> str:
    """Nodes are ``n1``, ``n2``, ..."""
    return f"n{number}"


def slurm_conf(shape: Shape, places: Places) -> str:
    """``slurm.conf``: no systemd, no cgroups; scheduled every two seconds; partitions debug, short, low, high.

    Signals go where ``proctrack/cgroup`` sends them, which most sites have: SIGTERM to the batch shell alone (here: to
    its process group), SIGKILL to all that the job started (here: by ``epilog``). ``proctrack/linuxproc`` would send
    SIGTERM to everything.
    """
    folder = places.folder
    controller = places.gateway if shape.namespaces else "127.0.0.1"
    lines = [
        "ClusterName=virtual",
        f"SlurmctldHost={places.host}({controller})",
        *("SlurmUser=root", "SlurmdUser=root"),
        *("AuthType=auth/munge", f"AuthInfo=socket={places.munge_socket}", "CryptoType=crypto/munge"),
        f"SlurmctldPort={places.controller_port}",
        f"SlurmctldPidFile={places.pid_file('slurmctld')}",
        f"SlurmdPidFile={places.pid_file('slurmd.%n')}",
        f"SlurmctldLogFile={places.log('slurmctld')}",
        f"SlurmdLogFile={places.log('slurmd.%n')}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"Epilog={places.epilog}",
        *("ProctrackType=proctrack/pgid", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none"),
        *("MpiDefault=none", "SwitchType=switch/none", "JobCompType=jobcomp/none"),
        *("ReturnToService=2", "SlurmdParameters=config_overrides"),
        *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core"),
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0",
        *("PreemptType=preempt/partition_prio", "PreemptMode=CANCEL"),
        "GresTypes=gpu",
        *("KillWait=30", "UnkillableStepTimeout=60", "MinJobAge=300", "SlurmdTimeout=15", "InactiveLimit=0"),
        "MessageTimeout=10",
        *_accounting(shape, places),
        *(_node(shape, places, number) for number in range(1, shape.nodes + 1)),
        "PartitionName=debug Nodes=ALL Default=YES DefaultTime=10 MaxTime=60 PriorityTier=10 PreemptMode=OFF",
        "PartitionName=short Nodes=ALL MaxTime=5 PriorityTier=10 PreemptMode=OFF",
        "PartitionName=low Nodes=ALL MaxTime=60 PriorityTier=1 PreemptMode=CANCEL",
        "PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=20 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _accounting(shape: Shape, places: Places) -> tuple[str, ...]:
    if not shape.accounting:
        return ("AccountingStorageType=accounting_storage/none",)
    return (
        *("AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1"),
        *(f"AccountingStoragePort={places.accounting_port}", f"AccountingStoragePass={places.munge_socket}"),
        *("AccountingStorageTRES=gres/gpu", "AccountingStorageEnforce=associations,limits,qos"),
    )


def _node(shape: Shape, places: Places, number: int) -> str:
    # In namespaces all have the first port: each has its own address.
    name = node_name(number)
    at = (
        f"NodeHostname={name} NodeAddr={places.network}.{number} Port={places.node_ports[0]}"
        if shape.namespaces
        else f"NodeHostname={places.host} NodeAddr=127.0.0.1 Port={places.node_ports[number - 1]}"
    )
    gpus = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    return f"NodeName={name} {at} CPUs={shape.cpus} RealMemory={shape.memory_mib}{gpus} State=UNKNOWN"


def gres_conf(shape: Shape, places: Places) -> str:
    """``gres.conf``. GPUs that are only counted, without files, put nodes in state INVAL."""
    if not shape.gpus:
        return ""
    files = f"{places.folder}/dev/nvidia[0-{shape.gpus - 1}]"
    return f"NodeName=n[1-{shape.nodes}] Name=gpu Flags=nvidia_gpu_env File={files}\n"


def epilog(places: Places, python: str) -> str:
    """A program that kills what a job has left, with all that it started: they carry the job's id, or descend from it.

    Another node's run of it for the same job carries the id too, and is seen here, where all nodes share their PIDs:
    killed, it would have its node drained ("Epilog error").

    ``python``: an interpreter with ``psutil``.
    """
    return EPILOG.format(python=python, conf=str(places.conf))


EPILOG = """\
#!{python}
import os, psutil
marks = {{"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"], "SLURM_CONF": {conf!r}}}
own = {{os.getpid(), *(parent.pid for parent in psutil.Process().parents())}}
for process in psutil.process_iter():
    try:
        environment = process.environ()
        if process.pid in own or any(environment.get(name) != value for name, value in marks.items()):
            continue
        if __file__ in process.cmdline():
            continue
        for member in (*process.children(recursive=True), process):
            member.kill()
    except psutil.Error:
        continue
"""


def slurmdbd_conf(places: Places) -> str:
    """``slurmdbd.conf``; it must be 0600."""
    lines = [
        *("AuthType=auth/munge", f"AuthInfo=socket={places.munge_socket}"),
        *("DbdHost=localhost", "DbdAddr=127.0.0.1", f"DbdPort={places.accounting_port}", "SlurmUser=root"),
        *(f"LogFile={places.log('slurmdbd')}", f"PidFile={places.pid_file('slurmdbd')}"),
        *("StorageType=accounting_storage/mysql", "StorageHost=127.0.0.1", f"StoragePort={places.database_port}"),
        *("StorageUser=slurm", "StoragePass=slurm", "StorageLoc=slurm_acct", "CommitDelay=1"),
    ]
    return "\n".join(lines) + "\n"


DATABASE_SQL = """
create database if not exists slurm_acct;
create user if not exists slurm@'127.0.0.1' identified by 'slurm';
create user if not exists slurm@localhost identified by 'slurm';
grant all on slurm_acct.* to slurm@'127.0.0.1';
grant all on slurm_acct.* to slurm@localhost;
"""
