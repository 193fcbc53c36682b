"""A private, real Ray head with the gateway's node provider, started exactly as in production, on free ports and tmp
folders.

    with local_cluster() as cluster:
        print(cluster.drive("import ray; print(ray.cluster_resources())"))

Everything is ended by PID and the folders are removed when the context ends, also after a failure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from gateway_plugin.blocks.ledger import Block, Ledger
from gateway_plugin.blocks.node_provider import open_pool
from gateway_plugin.blocks.pool import end_all
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import Mark
from gateway_plugin.service import ray_head
from gateway_plugin.site import Site, load_site
from tests.support.clocks import SLACK
from tests.support.ports import free_port

_SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from gateway_plugin.site import NodeType, Site

site = Site(
    name="local",
    port={port},
    ray_port={ray_port},
    node_types=(
        NodeType(
            name="local",
            provider=LocalProvider(launcher=SimpleLauncher(), init_blocks=0, min_blocks=0, max_blocks={max_blocks}),
            cpus={cpus},
            engine_memory_gib={engine_memory_gib},
            max_blocks={max_blocks},
            engines_on_loopback=True,
            worker_init={worker_init!r},
        ),
    ),
)
"""


def write_local_site(
    path: Path,
    max_blocks: int = 1,
    engine_memory_gib: float = 3.0,
    cpus: int = 2,
    worker_init: str = "",
    **ports: int,
) -> Path:
    """A site file like ``parsl_configs/local.py`` on free ports (``port``, ``ray_port``)."""
    for name in ("port", "ray_port"):
        while name not in ports:
            if (port := free_port()) not in ports.values():
                ports[name] = port
    text = _SITE.format(
        max_blocks=max_blocks, engine_memory_gib=engine_memory_gib, cpus=cpus, worker_init=worker_init, **ports
    )
    path.write_text(text, encoding="utf-8")
    return path


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0, pause_s: float = 0.1) -> Any:
    """The first true value of ``condition``. Raises ``TimeoutError`` naming ``what`` after ``SLACK`` times the time."""
    until = time.monotonic() + timeout_s * SLACK
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {timeout_s * SLACK:.0f} s")
        time.sleep(pause_s)
    return value


def command_line(process: psutil.Process) -> str:
    """Its arguments, joined; empty for one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def ray_sessions(layout: Layout) -> list[Path]:
    """Session folders of a head's Ray, oldest first: logs, one for every start."""
    return sorted(path for path in layout.ray_temp.glob("session_2*") if path.is_dir() and not path.is_symlink())


def opened(marks: Iterable[Mark]) -> list[psutil.Process]:
    """Those of the processes that still live, for ``psutil``'s other questions."""
    found = []
    for known in marks:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(known.pid))
    return found


class LocalCluster:
    """One gateway's Ray: the head as a child of this process, blocks by the product's own provider."""

    def __init__(self, layout: Layout, site: Site, site_reference: str) -> None:
        self.layout = layout
        self.site = site
        self.site_reference = site_reference
        self.head_ip = ray_head.head_address(site)
        self.head: subprocess.Popen[bytes] | None = None

    @property
    def ray_address(self) -> str:
        """``IP:port`` of the head."""
        return f"{self.head_ip}:{self.site.ray_port}"

    def start(self) -> LocalCluster:
        """Start the head and wait until it reports its start; retry as the supervisor does.

        Ray's node gives up if its helper processes take 15 s to import, which happens on a machine under load.
        """
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                return self._start()
            ray_head.end_leftovers(self.layout)
        return self._start()

    def _start(self) -> LocalCluster:
        layout = self.layout
        layout.make()
        ray_head.prepare(layout, self.site, self.site_reference, self.head_ip)
        with open(layout.logs / "ray-head.log", "ab") as log:
            self.head = subprocess.Popen(
                ray_head.head_argv(layout, self.site, self.head_ip, sys.executable),
                env=ray_head.head_env(layout, self.site, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        note = layout.ray_temp / "ray_current_cluster"
        wait_for(lambda: note.exists() or self._head_died(), "Ray head")
        return self

    def _head_died(self) -> bool:
        assert self.head is not None
        if self.head.poll() is None:
            return False
        raise RuntimeError(f"the head ended with {self.head.returncode}:\n{self.log_text()}")

    def log_text(self, last: int = 4000) -> str:
        """The end of the output of ``ray start --head``."""
        return (self.layout.logs / "ray-head.log").read_text(errors="replace")[-last:]

    def monitor_log(self) -> str:
        """The log of the autoscaler and the node provider, over all starts of the head."""
        files = [path for folder in ray_sessions(self.layout) for path in folder.glob("logs/monitor.*")]
        return "".join(path.read_text(errors="replace") for path in files)

    def head_processes(self) -> list[psutil.Process]:
        """Every process of the head: GCS, raylet, monitor, agents, workers, and ``ray start`` itself."""
        return opened(ray_head.leftover_processes(self.layout))

    def process(self, part: str) -> psutil.Process:
        """The one process of the head with ``part`` in its command line, such as ``gcs_server`` or ``monitor.py``."""
        (found,) = [process for process in self.head_processes() if part in command_line(process)]
        return found

    def kill_head(self) -> None:
        """SIGKILL to everything of the head at once. Blocks are left alone."""
        victims = self.head_processes()
        for verb in ("suspend", "kill"):
            for process in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(process, verb)()
        psutil.wait_procs(victims, timeout=10)
        if self.head is not None:
            self.head.wait(10)

    def restart_head(self) -> LocalCluster:
        """As the supervisor after the head's death: remove the remains, start it on the same port and folder."""
        left = ray_head.end_leftovers(self.layout)
        if left:
            raise RuntimeError(f"could not be ended: {left}")
        if self.head is not None:
            self.head.wait(10)
        return self.start()

    def blocks(self, ended: bool = False) -> list[Block]:
        """The blocks in the ledger that hold a node (or all of them)."""
        return [block for block in Ledger(self.layout.ledger).read().values() if ended or not block.phase.ended]

    def env(self) -> dict[str, str]:
        """The environment of a driver."""
        return ray_head.driver_env(self.layout, os.environ)

    def driver(self, code: str) -> subprocess.Popen[str]:
        """Start ``code`` in a process of its own, joined to this Ray in namespace ``gateway``."""
        joined = f"import ray\nray.init(address={self.ray_address!r}, namespace='gateway', log_to_driver=False, "
        joined += "logging_level='ERROR')\n" + textwrap.dedent(code)
        return subprocess.Popen(
            (sys.executable, "-c", joined),
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def drive(self, code: str, timeout_s: float = 60.0) -> str:
        """The output of ``code``, run as in ``driver``. Raises ``RuntimeError`` with its stderr if it failed."""
        process = self.driver(code)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise RuntimeError(f"driver: not done in {timeout_s:.0f} s:\n{out}\n{err}") from None
        if process.returncode != 0:
            raise RuntimeError(f"driver: exit code {process.returncode}:\n{out}\n{err}")
        return out.strip()

    def stop(self) -> None:
        """End the head, then every block, and forget Ray's tables, as ``down`` does.

        Raises:
            RuntimeError: something could not be ended.
        """
        left = ray_head.end_leftovers(self.layout, grace_s=2.0)
        if self.head is not None:
            self.head.wait(10)
        blocks = end_all(open_pool(self.site, self.layout), deadline_s=60)
        if left or blocks:
            raise RuntimeError(f"could not be ended: {left} {blocks}")
        ray_head.forget(self.layout)


@contextlib.contextmanager
def local_cluster(
    max_blocks: int = 1, engine_memory_gib: float = 3.0, cpus: int = 2, worker_init: str = ""
) -> Iterator[LocalCluster]:
    """A running cluster in ``/tmp/gwt-XXXX``; nothing is left of it afterwards."""
    root = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    layout = Layout(private_folder(root / "state"))
    reference = str(write_local_site(root / "site.py", max_blocks, engine_memory_gib, cpus, worker_init))
    cluster = LocalCluster(layout, load_site(reference), reference)
    try:
        yield cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(root)
        shutil.rmtree(layout.run)
