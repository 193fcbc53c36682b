"""The supervisor: one process in a session of its own that keeps edge, Ray head and application alive.

Run as ``python -m gateway_plugin.service.supervisor --state DIR`` by ``gateway up``. ``plan.decide`` decides; this
module looks, starts and ends. SIGTERM ends everything in order. After ``kill -9`` the parts live on, and the next
supervisor finds them among the processes and takes them over.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from gateway_plugin.clock import SteadyClock
from gateway_plugin.edge import process as edge_process
from gateway_plugin.errors import GatewayError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, alive, end, end_words, mark
from gateway_plugin.service import ray_head
from gateway_plugin.service.deployment import noted
from gateway_plugin.service.discovery import deployments_of, edges_of, heads_of
from gateway_plugin.service.draining import drain_as_asked, forget_requests
from gateway_plugin.service.key_sync import keep_keys_in_force
from gateway_plugin.service.listeners import bind_problem
from gateway_plugin.service.probes import ANY_ADDRESS, Probes, probe
from gateway_plugin.service.restart_policy import (
    Action,
    PartName,
    Phase,
    Plan,
    Seen,
    adopted,
    could_not_start,
    decide,
    with_mark,
)
from gateway_plugin.service.supervisor_state import SupervisorState, supervisor_file, supervisor_state
from gateway_plugin.service.teardown import end_everything, end_head
from gateway_plugin.service_state import mend_record, write_record

log = logging.getLogger("gateway.supervisor")

_HEAD_NICE = 5
"""Of the Ray head, or the supervisor's own niceness where that is higher: lowering it takes a privilege. On a machine
of few processors a flood keeps the ingress and the controller busy, and the edge would get one share of many."""
_LOOK_S = 0.1
_PROBE_S = 0.5


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="gateway-supervisor")
    parser.add_argument("--state", type=Path, required=True)
    options = parser.parse_args()
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # core files hold prompts and keys: none of its parts' either
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it notes every look at the front door
    layout = Layout.of(options.state)
    with layout.supervisor_lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another supervisor holds %s", layout.supervisor_lock)
            return 75
        try:
            return Supervisor(layout).run()
        except GatewayError as error:
            log.warning("%s", error.message)
            return error.exit_code


class Supervisor:
    """The shell around ``plan.decide``. One thread looks and acts; one more asks the doors."""

    def __init__(self, layout: Layout) -> None:
        gateway, own = noted(layout), mark(os.getpid())
        assert own is not None  # this process lives
        self._layout = layout
        self._own = own
        self._record = gateway.record.model_copy(update={"supervisor": own})
        write_record(layout, self._record)
        self._gateway = gateway
        self._clock = SteadyClock()
        self._plan = Plan()
        self._children: dict[PartName, subprocess.Popen[bytes]] = {}
        self._ends: dict[PartName, str] = {}
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="probe")
        self._probing: Future[Probes] | None = None
        self._probed_at = 0.0
        self._probes = Probes()
        self._written = SupervisorState()
        self._files: dict[Path, tuple[int, int, int] | None] = {}
        """Notes as they were when last looked at: others may garble them."""

    def run(self) -> int:
        """Keep everything alive until SIGTERM, then drain and end it; a second one hurries. Returns the exit code."""
        signal.signal(signal.SIGTERM, self._asked_to_stop)
        signal.signal(signal.SIGINT, self._asked_to_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._plan = self._adopt(self._clock.now())
        forget_requests(self._layout)
        log.info("start pid=%d state=%s", self._own.pid, self._layout.state)
        threading.Thread(target=keep_keys_in_force, args=(self._layout, self._stop), name="keys", daemon=True).start()
        while not self._stop.is_set():
            try:
                self._turn(self._clock.now())
            except (OSError, GatewayError):
                log.exception("turn failed")  # a full disk, say; the parts are not to be left alone for that
                self._stop.wait(1.0)
            self._stop.wait(_LOOK_S)
        return self._end()

    def _turn(self, now: float) -> None:
        before = self._plan
        self._plan, actions = decide(before, self._look(before, now), now)
        self._tell(before, self._plan)
        for action in actions:
            self._plan = self._perform(action, self._plan, now)  # kept at once: what was started must not be forgotten
        self._mend_record()
        self._write("running", self._plan, now)

    def _asked_to_stop(self, number: int, _frame: FrameType | None) -> None:
        log.info("stop signal=%s", signal.Signals(number).name)
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    # --- looking ---

    def _adopt(self, now: float) -> Plan:
        """The living parts, whether an earlier supervisor noted them or not. Of several edges one is
        kept: they share the port."""
        end(deployments_of(self._layout), grace_s=0.5)  # an exit code could not be read; deploying again costs nothing
        edges, heads = edges_of(self._layout), heads_of(self._layout)
        end((*edges[1:], *heads[1:]), grace_s=0.5)
        edge, head = next(iter(edges), None), next(iter(heads), None)
        log.info("adopt edge=%s head=%s", edge and edge.pid, head and head.pid)
        return adopted(edge, head, now)

    def _look(self, plan: Plan, now: float) -> Seen:
        self._probe(plan, now)
        edge_alive = self._alive(PartName.EDGE, plan.edge.mark)
        head_alive = self._alive(PartName.HEAD, plan.head.mark)
        deploy_alive = self._alive(PartName.SERVE, plan.serve.mark)
        head_end = self._ends.get(PartName.HEAD, "")
        if head_alive and plan.head.phase is Phase.RUNNING and not self._probes.head_whole:
            head_alive, head_end = False, "its GCS or raylet ended"
        if head_alive and plan.head.phase is Phase.STARTING and self._probes.port_lost:
            head_alive, head_end = False, self._probes.port_lost
        return Seen(
            edge_alive=edge_alive,
            edge_answers=self._probes.edge_answers,
            edge_end=self._ends.get(PartName.EDGE, ""),
            head_alive=head_alive,
            head_answers=self._probes.head_answers,
            head_end=head_end,
            deploy_alive=deploy_alive,
            deploy_ok=self._ends.get(PartName.SERVE) == "",
            deploy_end=self._ends.get(PartName.SERVE, ""),
            ready=self._probes.ready,
            busy=self._probes.busy,
        )

    def _alive(self, name: PartName, known: Mark | None) -> bool:
        child = self._children.get(name)
        if child is None:
            return alive(known)  # adopted
        code = child.poll()
        if code is not None:
            self._ends[name] = end_words(code)
        return code is None

    def _probe(self, plan: Plan, now: float) -> None:
        if self._probing is not None and self._probing.done():
            self._probes, self._probing = self._probing.result(), None
        if self._probing is None and now - self._probed_at >= _PROBE_S:
            self._probed_at = now
            self._probing = self._pool.submit(
                probe, self._layout, self._record, plan.head.mark, starting=plan.head.phase is Phase.STARTING
            )

    def _forget_probes(self, **changed: Any) -> None:
        """What was seen before a start or an end says nothing of the part that is there now."""
        self._probes = replace(self._probes, **changed)
        self._probing, self._probed_at = None, 0.0

    # --- acting ---

    def _perform(self, action: Action, plan: Plan, now: float) -> Plan:
        log.info("action %s", action.value)
        if action is Action.END_HEAD:
            self._forget_probes(head_answers=False, head_whole=True)
            child = self._children.pop(PartName.HEAD, None)
            end_head(self._layout, mark(child.pid) if child else None, grace_s=0.5)
            return plan
        if action is Action.END_DEPLOY:
            driver = self._children.pop(PartName.SERVE, None)
            if driver is not None:
                driver.kill()
                driver.wait()
            return plan
        starts: dict[Action, tuple[PartName, Callable[[], subprocess.Popen[bytes]]]] = {
            Action.START_EDGE: (PartName.EDGE, self._start_edge),
            Action.START_HEAD: (PartName.HEAD, self._start_head),
            Action.START_DEPLOY: (PartName.SERVE, self._start_deploy),
        }
        name, start = starts[action]
        self._ends.pop(name, None)
        try:
            child = start()
        except (OSError, GatewayError) as error:
            log.warning("start of %s failed: %s", name.value, error)
            return could_not_start(plan, name, str(error), now)
        self._children[name] = child
        return with_mark(plan, name, mark(child.pid, dead_too=True))

    def _start_edge(self) -> subprocess.Popen[bytes]:
        self._forget_probes(edge_answers=False, ready=False)
        if end(edges_of(self._layout), grace_s=0.0):  # the kernel would deal connections out to both
            raise ServiceError("an earlier edge cannot be ended")
        edge_process.mend_maps(self._layout)
        return self._spawn(edge_process.argv(self._layout), os.environ, self._layout.usage_log, self._layout.edge_log)

    def _start_head(self) -> subprocess.Popen[bytes]:
        self._forget_probes(head_answers=False, head_whole=True, port_lost="")
        end_head(self._layout, None, grace_s=0.5)
        record, site = self._record, self._gateway.site
        problem = bind_problem(ANY_ADDRESS, record.ray_port)
        if problem is not None:
            raise ServiceError(f"port {record.ray_port} (Ray): {problem}")
        ray_head.prepare(self._layout, site, record.site_reference, record.head_address)
        argv = ray_head.head_argv(self._layout, site, record.head_address, sys.executable)
        environment = ray_head.head_env(self._layout, site, os.environ)
        child = self._spawn(argv, environment, self._layout.head_log, self._layout.head_log)
        # All that Ray starts here inherits it: loaded models, health and refusals need the edge alone.
        with contextlib.suppress(OSError):  # it ended at once, or a limit forbids it; the head serves without it
            os.setpriority(os.PRIO_PROCESS, child.pid, max(_HEAD_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
        return child

    def _start_deploy(self) -> subprocess.Popen[bytes]:
        argv = (sys.executable, "-m", "gateway_plugin.service.deploy", "--state", str(self._layout.state))
        environment = ray_head.driver_env(self._layout, os.environ)
        return self._spawn(argv, environment, self._layout.deploy_log, self._layout.deploy_log)

    def _spawn(
        self, argv: tuple[str, ...], environment: Mapping[str, str], out: Path, err: Path
    ) -> subprocess.Popen[bytes]:
        """A child in a session of its own: Ray's reaper ends its whole process group, and that must not be ours."""
        with _append(out) as output, _append(err) as errors:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=dict(environment),
                start_new_session=True, cwd="/",
            )  # fmt: skip

    # --- telling ---

    def _tell(self, before: Plan, after: Plan) -> None:
        for name in PartName:
            was, now = getattr(before, name.value), getattr(after, name.value)
            if was.phase is not now.phase:
                log.info("%s %s -> %s restarts=%d %s", name.value, was.phase, now.phase, now.restarts, now.error)

    def _changed(self, path: Path) -> bool:
        """Whether a file is another than at the last look."""
        before = self._files.get(path, ())
        try:
            found = path.stat()
            self._files[path] = (found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            self._files[path] = None
        return self._files[path] != before

    def _mend_record(self) -> None:
        if not self._changed(self._layout.service_json):
            return
        try:
            if aside := mend_record(self._layout, self._record):
                log.warning("garbled record set_aside=%s", aside)
        except OSError as error:  # tried again with the next look
            log.warning("%s cannot be mended: %s", self._layout.service_json, error)
            del self._files[self._layout.service_json]

    def _write(self, stage: str, plan: Plan, now: float) -> None:
        state = supervisor_state(plan, stage, self._own, now, self._record)
        if state.model_copy(update={"updated": self._written.updated}) == self._written and not self._changed(
            self._layout.supervisor_status
        ):
            return
        try:
            supervisor_file(self._layout).write(state)
            self._written = state
            self._changed(self._layout.supervisor_status)
        except OSError as error:  # tried again with the next look
            log.warning("%s cannot be written: %s", self._layout.supervisor_status, error)

    def _end(self) -> int:
        try:
            self._write("stopping", self._plan, self._clock.now())
            self._pool.shutdown(wait=False, cancel_futures=True)
            drain_as_asked(self._layout, self._hurry)
        except Exception:  # the processes must be ended after any error
            log.exception("drain failed")
        for child in self._children.values():
            child.poll()

        def tell(what: str) -> None:
            log.info("end %s", what)
            for child in self._children.values():
                child.poll()

        left = end_everything(self._layout, self._gateway.site, tell, keep=self._own)
        log.info("ended left=%s", left)
        return 1 if left else 0


def _append(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")


if __name__ == "__main__":
    sys.exit(main())
