"""What ``make demo-slurm`` runs: the workflow of ``make demo`` on a real Slurm with two nodes, one model on each.

The Slurm is a virtual one, all on this machine: its nodes are network namespaces, its daemons end with the demo. Needs
root and Slurm's packages. Prints ``squeue`` whenever it changes: two jobs come when two models are wanted, and go when
they are not wanted any more. Ends with ``demo ok: 2 models, 2 blocks, R requests, 0 failed`` and an empty queue. Uses a
state folder of its own (build/demo-slurm, or $DEMO_STATE). Ctrl-C ends everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.run_demo import (
    CATALOG,
    POLL_S,
    ROOT,
    Demo,
    free_port,
    run_to_its_end,
    sigterm_as_ctrl_c,
    undisturbed,
    vllm_is_missing,
)
from gateway_plugin.catalog import load_catalog
from gateway_plugin.client import Client
from tests.support.slurm.configuration import Shape
from tests.support.slurm.virtual import VirtualSlurm, missing

STATE = Path(os.environ.get("DEMO_STATE") or ROOT / "build" / "demo-slurm").absolute()
NODES = 2
BLOCK_IDLE_S = 5.0
EMPTY_WITHIN_S = 120.0
QUEUE_FORMAT = "%.6i %.30j %.10T %.7M %.5D %R"

_SITE = """\
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from gateway_plugin.site import NodeType, Site

site = Site(
    name="demo-slurm", head_address={head!r}, port={port}, ray_port={ray_port},
    block_idle_s={block_idle_s}, last_block_idle_s={block_idle_s},
    node_types=(
        NodeType(
            name="node",
            provider=SlurmProvider(partition="debug", launcher=SimpleLauncher(), walltime="00:55:00"),
            cpus={cpus}, engine_memory_gib=3.0, max_blocks={nodes}, worker_init={worker_init!r},
        ),
    ),
)
"""


def queue_changed(before: str, now: str) -> bool:
    """Whether two answers of ``squeue`` differ in more than how long jobs have run. Pure."""

    def rows(said: str) -> list[list[str]]:
        return [[field for place, field in enumerate(line.split()) if place != 3] for line in said.splitlines()]

    return rows(before) != rows(now)


class SlurmDemo(Demo):
    """One run of it, on a Slurm that is there."""

    blocks = f"and {NODES} nodes of a virtual Slurm for its blocks"
    shows = f"examples/quickstart.py; each of the {NODES} nodes has room for one model"

    def __init__(self, slurm: VirtualSlurm) -> None:
        super().__init__(STATE)
        self.slurm = slurm
        self.environment["SLURM_CONF"] = str(slurm.places.conf)
        self.jobs: set[str] = set()
        """Every job seen in the queue."""

    def site(self) -> tuple[str, int]:
        """Blocks join over the bridge between this machine and the nodes."""
        ports = {"port": free_port(), "ray_port": free_port()}
        path = self.state.parent / f"{self.state.name}_site.py"
        path.write_text(
            _SITE.format(
                head=self.slurm.places.gateway,
                worker_init=f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}",
                cpus=self.slurm.shape.cpus,
                nodes=NODES,
                block_idle_s=BLOCK_IDLE_S,
                **ports,
            )
        )
        return str(path), ports["port"]

    def counted(self, switches: int) -> str:
        """Blocks instead of switches: here no model makes room for another."""
        return f"{len(self.jobs)} blocks"

    def shown(self, switches: int) -> bool:
        """Whether there were nodes for both models and the queue is empty; a block that fails is asked for again."""
        return len(self.jobs) >= NODES and not self.slurm.run("squeue", "-h")

    def workflow(self) -> tuple[int, int]:
        """Ask for both models at once, run the quickstart, let the models go, and see the blocks given back."""
        with Client(state=self.state) as client, self.squeue_shown():
            models = [model.name for model in load_catalog(CATALOG, unsized=True).models]
            for model in models:
                client.load(model)
            code, switches = super().workflow()
            if code:
                return code, switches
            self.screen.line(f"    models unloaded: blocks go after {BLOCK_IDLE_S:.0f} s without one")
            for model in models:
                client.unload(model)
            until = time.monotonic() + EMPTY_WITHIN_S
            while self.slurm.run("squeue", "-h") and time.monotonic() < until:
                time.sleep(POLL_S)
            return 0, switches

    @contextmanager
    def squeue_shown(self) -> Iterator[None]:
        """Print the queue whenever it changes, until the end of this context."""
        over = threading.Event()
        thread = threading.Thread(target=self._follow_queue, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _follow_queue(self, over: threading.Event) -> None:
        before = ""
        last = False
        while not last:
            last = over.wait(POLL_S)  # once more after the end: the empty queue is worth seeing
            try:
                said = self.slurm.run("squeue", "-h", "-o", QUEUE_FORMAT)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                self.screen.waiting(str(error))
                continue
            self.jobs |= {line.split()[0] for line in said.splitlines()}
            if queue_changed(before, said):
                self.screen.line("    squeue")
                for line in said.splitlines() or ["       (empty)"]:
                    self.screen.text(line)
                before = said


def main() -> int:
    """Returns the exit code."""
    if vllm_is_missing():
        return 69
    if (reason := missing()) is not None:
        print(f"{reason}. 'make demo' needs none of it.", file=sys.stderr)
        return 69
    sigterm_as_ctrl_c()
    slurm = VirtualSlurm(Shape(nodes=NODES, cpus=os.cpu_count() or 1, gpus=0, accounting=False))
    try:
        slurm.start()
        return run_to_its_end(SlurmDemo(slurm))
    except KeyboardInterrupt:
        print("interrupted; no gateway was started", file=sys.stderr)
        return 130
    finally:
        with undisturbed():
            slurm.stop()


if __name__ == "__main__":
    sys.exit(main())
