"""A whole gateway on this machine, started as a user starts it (``gateway up``), with fake engines. Nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from gateway_plugin.paths import Layout
from gateway_plugin.processes import arguments
from tests.support import aftermath
from tests.support.clocks import SLACK
from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]

_SITE = """
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from gateway_plugin.site import Limits, NodeType, Site

site = Site(
    name="test", port={port}, ray_port={ray_port}, block_idle_s={block_idle_s},
    last_block_idle_s={block_idle_s}, switching={switching!r},
    limits=Limits(**{limits!r}),
    node_types=(NodeType(
        name="local",
        provider=LocalProvider(launcher=SimpleLauncher(), init_blocks=0, min_blocks=0, max_blocks={blocks}),
        cpus=2, engine_memory_gib={memory_gib}, max_blocks={blocks}, engines_on_loopback=True,
    ),),
)
"""


def fake_model(folder: Path, *options: str, memory_gib: float = 1.0, **entry: Any) -> dict[str, Any]:
    """A catalog entry whose engine is the fake one; all of them together must not hold more than 1.5 GiB."""
    return {
        "source": str(folder),
        "engine": "command",
        "command": [
            sys.executable, "-m", "tests.support.fake_engine", "--host", "{host}", "--port", "{port}",
            "--served-model-name", "{names}", "--ssl-keyfile", "{keyfile}", "--ssl-certfile", "{certfile}",
            "--ssl-ca-certs", "{cafile}", "--ssl-cert-reqs", "2",
            "--memory-marker", str(folder), "--memory-mib", str(int(memory_gib * 1024)), "--memory-room-mib", "1536",
            *options,
        ],
        "env": {"PYTHONPATH": str(ROOT)},
        "memory_gib": memory_gib,
        **entry,
    }  # fmt: skip


@dataclass
class Gateway:
    """A running gateway and its folders."""

    folder: Path
    layout: Layout
    site: Path
    catalog: Path
    environment: dict[str, str] = field(default_factory=dict)

    def cli(self, *arguments: str, timeout: float = 240, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``gateway ...`` with this gateway's state folder."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway_plugin.cli.main", "--state", str(self.layout.state), *arguments],
            capture_output=True, text=True, timeout=timeout, env=self.environment, cwd=ROOT, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"gateway {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def up(self) -> None:
        """``gateway up``."""
        self.cli("up", "--site", str(self.site), "--models", str(self.catalog))

    @property
    def url(self) -> str:
        return str(json.loads(self.layout.service_json.read_text())["url"])

    @property
    def key(self) -> str:
        return self.layout.admin_key.read_text().strip()

    @property
    def trust(self) -> ssl.SSLContext:
        """What a caller verifies the front door with."""
        return ssl.create_default_context(cafile=str(self.layout.ca))

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.key}"}
        return {"base_url": self.url, "headers": headers, "timeout": 120, "verify": self.trust, **given}

    def client(self, **options: Any) -> httpx.Client:
        """An HTTP client with the admin key."""
        return httpx.Client(**self._options(options))

    def async_client(self, **options: Any) -> httpx.AsyncClient:
        """The same, asynchronous."""
        return httpx.AsyncClient(**self._options(options))

    def status(self) -> dict[str, Any]:
        """``GET /gateway/v1/status``."""
        with self.client() as client:
            response = client.get("/gateway/v1/status")
            response.raise_for_status()
            found: dict[str, Any] = response.json()
            return found

    def chat(self, model: str, prompt: str = "hello", **options: Any) -> httpx.Response:
        """One chat completion."""
        with self.client() as client:
            return client.post("/v1/chat/completions", json=chat_body(model, prompt, **options))

    def engine_pids(self) -> dict[str, int]:
        """Engine -> PID of its process, from the records on the node."""
        found = {}
        for path in self.layout.engine_records.glob("*.json"):
            try:
                record = json.loads(path.read_text())
            except (FileNotFoundError, ValueError):  # ended, or being replaced, while we looked
                continue
            if psutil.pid_exists(record["pid"]):
                found[record["engine"]] = record["pid"]
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process that names this gateway's folders in its command line or environment."""
        marks = (str(self.folder), str(self.layout.run))
        found = []
        for process in psutil.process_iter():
            if process.pid == os.getpid():
                continue
            try:
                text = " ".join([*process.cmdline(), *process.environ().values()])
                if any(mark in text for mark in marks) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def replicas(self) -> dict[str, int]:
        """The application's replicas: name -> PID."""
        found = {}
        for process in self.processes():
            title = " ".join(arguments(process.pid)[:1])
            if title.startswith("ray::ServeReplica:"):
                found[title.partition(".")[0]] = process.pid
        return found


def chat_body(model: str, prompt: str = "hello", **options: Any) -> dict[str, Any]:
    """The JSON of one chat completion, model last as the openai client writes it."""
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **options, "model": model}


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str | Callable[[], str]) -> Any:
    """Poll until ``condition`` is true; its value. Fails with ``what`` (or its result) after ``SLACK`` times
    ``timeout_s``.

    To ask a gateway or Slurm takes processor time from what is waited for: after the first second less often, and never
    more than half of the time.
    """
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        value = condition()
        if value:
            return value
        now = time.monotonic()
        if now > began + timeout_s * SLACK:
            raise AssertionError(f"not within {timeout_s * SLACK:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(max(0.05 if now < began + 1.0 else 0.2, now - asked))


@contextmanager
def gateway(
    models: Callable[[Path], Mapping[str, Any]],
    *,
    memory_gib: float = 1.5,
    blocks: int = 1,
    block_idle_s: float = 300.0,
    limits: Mapping[str, Any] | None = None,
    switching: str = "pressure",
    start: bool = True,
) -> Iterator[Gateway]:
    """A gateway with these models; ended afterwards, by force if necessary, and checked for leftovers."""

    def site(port: int, ray_port: int) -> str:
        return _SITE.format(
            port=port, ray_port=ray_port, block_idle_s=block_idle_s, blocks=blocks,
            memory_gib=memory_gib, limits=dict(limits or {}), switching=switching,
        )  # fmt: skip

    with gateway_of(site, models, start=start) as made:
        yield made


@contextmanager
def gateway_of(
    site_text: Callable[[int, int], str],
    models: Callable[[Path], Mapping[str, Any]],
    *,
    start: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Gateway]:
    """A gateway of a site written for two free ports (front door, Ray); ended as by ``gateway``.

    ``environment``: instead of this process's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="gwt-", dir="/tmp"))
    memory = folder / "memory"
    memory.mkdir()
    site = folder / "site.py"
    site.write_text(site_text(*free_ports(2)))
    catalog = folder / "models.yaml"
    catalog.write_text(yaml.safe_dump({"models": dict(models(memory))}))
    own = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
    for name in ("GATEWAY_URL", "GATEWAY_API_KEY", "RAY_ADDRESS"):
        own.pop(name, None)
    made = Gateway(folder, Layout(folder / "state"), site, catalog, own)
    aftermath.running.append(made)
    try:
        if start:
            made.up()
        yield made
        made.cli("down", "--grace", "0")
        left = made.processes()
        assert not left, f"'gateway down' left {[(p.pid, p.cmdline()[:6]) for p in left]}"
        assert not list(made.layout.run.glob("*.sock")), "'gateway down' left sockets"
    except Exception as error:
        error.add_note(aftermath.state_of(made))
        if os.environ.get("GATEWAY_TEST_KEEP"):
            print(f"kept: {folder}")
        raise
    finally:
        aftermath.running.remove(made)
        for process in made.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if not os.environ.get("GATEWAY_TEST_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(made.layout.run, ignore_errors=True)
