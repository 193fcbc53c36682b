"""An endpoint's life: configure, start, stop, status, delete; the real ``globus-compute-endpoint`` serves.

State lies in ``endpoints/`` of the state folder: the environment, the manifest of functions, one folder an endpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gateway_plugin.connection import authority_of, demand_proof, known_url, on_loopback
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.globus import function_registry as manifest
from gateway_plugin.globus import kept
from gateway_plugin.globus.endpoint import config_files as config
from gateway_plugin.globus.endpoint import process as agent
from gateway_plugin.globus.endpoint import shared_folder as shared
from gateway_plugin.globus.endpoint import venv as environment
from gateway_plugin.globus.endpoint.config_files import EndpointSettings
from gateway_plugin.globus.endpoint.registrar_client import Pause, Registrar
from gateway_plugin.globus.endpoint.store import EndpointRecord, Options, Records
from gateway_plugin.paths import Layout, private_folder, write_private
from gateway_plugin.processes import Mark, alive, descendants, end

Report = Callable[[str, str], None]
"""Progress callback: step, and how far."""

_STOP_S = 20.0


@dataclass(frozen=True)
class EndpointStatus:
    """Status of one endpoint."""

    name: str
    id: str
    state: str
    """``online``; ``starting``: it runs, not yet online at Globus; ``stopped``; ``unknown``: not visible from here."""
    pid: int | None
    """Of a process on this machine."""
    host: str | None
    """The machine that it was started on, unless it is stopped."""
    functions: tuple[manifest.Function, ...]
    """Functions it may run, the one of this version last."""
    heartbeat_age_s: float | None
    """Age of the process's last heartbeat."""
    tasks_done: int | None
    """``None``: not known, of mapped users."""
    note: str | None = None

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "functions": [function.model_dump(mode="json") for function in self.functions]}


class Endpoints:
    """The endpoints of one gateway's state folder. ``pause``: entered during a login on the terminal."""

    def __init__(self, layout: Layout, pause: Pause = nullcontext) -> None:
        self._layout = layout
        self._pause = pause
        self._root = layout.endpoints
        self._records = Records(self._root)
        self._globus = self._root / "globus"
        self._manifest = layout.functions
        self._here = socket.gethostname()

    # --- configure ---
    def configure(
        self, name: str, options: Options, report: Report, *, afresh: bool = False, newest_only: bool = False
    ) -> EndpointStatus:
        """Write the given and the kept ``options``, make the environment, register function and endpoint.

        ``afresh``: kept options are dropped; ``newest_only``: older versions' functions are not allowed any more.

        Raises:
            ConfigError: invalid for an endpoint here.
            ServiceError: the environment cannot be made, or Globus Compute refuses.
        """
        before = self._records.find(name) if config.ENDPOINT_NAME.fullmatch(name) else None
        if before is not None and not afresh:
            options = options.over(before.options)
        settings = self._settings(name, options)
        shared.check_user(options)
        shared.check_files(options)
        private_folder(self._layout.state)
        private_folder(self._root)
        place = options.shared_folder or self._root
        if options.shared_folder is not None:
            shared.make(place)
        used = self._environment(options, place, report)
        private_folder(self._globus)
        folder = private_folder(self._globus / name)
        with self._registrar(used) as registrar:
            report("identity", "asking Globus")
            settings = config.with_owner(settings, registrar.ask("identity"))
            report("function", "registering")
            function = self._register_function(registrar)
            report("function", function.id)
            older = before.functions if before is not None and not newest_only else ()
            allowed = (*(known for known in older if known != function.id), function.id)
            if options.shared_folder is not None and settings.ca is not None:
                settings = replace(settings, ca=str(shared.copy(Path(settings.ca), place / f"{name}.ca.pem")))
            site_file = self._site_file(name, options)
            write_private(site_file, json.dumps(config.site_document(settings), indent=1) + "\n")
            if options.shared_folder is not None:
                site_file.chmod(0o644)  # no secret in it, and every mapped user reads it
            write_private(folder / "config.yaml", config.core_yaml(settings, allowed))
            write_private(folder / "user_config_template.yaml.j2", config.template(settings))
            write_private(folder / "user_config_schema.json", config.schema())
            write_private(folder / "user_environment.yaml", config.user_environment(site_file, used))
            report("endpoint", "registering")
            endpoint = str(registrar.ask("register_endpoint", folder=str(folder)))
            report("endpoint", endpoint)
        with self._records.locked():
            made = EndpointRecord(id=endpoint, venv=used, functions=allowed, answers=settings.answers, options=options)
            now = self._records.find(name)
            if now is not None:  # it may have been started or stopped meanwhile
                made = made.model_copy(update={"process": now.process, "host": now.host})
            self._records.write(name, made)
        return self.status(name)

    def _settings(self, name: str, options: Options) -> EndpointSettings:
        if bool(options.multi_user) != (options.identity_mapping is not None):
            raise ConfigError("--multi-user and --identity-mapping FILE go together.")
        url = options.url or known_url(self._layout)
        demand_proof(url)
        ca = options.ca or authority_of(self._layout, url) or (self._layout.ca if _is_own(url, self._layout) else None)
        given = options.model_dump(
            include={"key_file", "input_folder", "workers", "heartbeat_s", "identity_mapping", "contact"},
            exclude_none=True,
        )
        digest = hashlib.sha256(f"{self._layout.state}:{name}".encode()).hexdigest()[:8]
        return EndpointSettings(
            name=name,
            url=url.rstrip("/").removesuffix("/v1"),
            # in a mapped user's own state home, with a folder for each gateway
            answers=f"gateway-plugin/{name}-{digest}" if options.multi_user else str(self._root / "answers" / name),
            ca=str(ca) if ca else None,
            **given,
        )

    def _environment(self, options: Options, place: Path, report: Report) -> Path:
        used = (options.venv or place / "venv").absolute()
        if options.venv is not None:
            if not environment.program(used).exists():
                raise ConfigError(f"{used} has no globus-compute-endpoint; leave --venv out to have one made.")
        elif not environment.is_complete(used):
            for name in self.names():
                record = self._records.known(name)
                if record.venv == used and (record.elsewhere(self._here) or alive(record.process)):
                    raise ConfigError(
                        f"The endpoint '{name}' runs from {used}, which this version has to make anew: "
                        f"'gateway endpoint stop {name}' first."
                    )
            environment.make(used, lambda words: report("environment", words))
        if options.shared_folder is not None:
            shared.check_program(environment.program(used))
        report("environment", "ready")
        return used

    def _register_function(self, registrar: Registrar) -> manifest.Function:
        text = manifest.source()
        known = manifest.read(self._manifest)
        found = manifest.registered(known, text)
        if found is None:
            version = manifest.version_of(text)
            words = f"gateway-plugin {version}: asks a site's gateway"
            given = registrar.ask("register_function", source=text, entry_point=manifest.ENTRY_POINT, description=words)
            found = manifest.Function(version=version, sha256=manifest.digest_of(text), id=str(given))
            manifest.write(self._manifest, (*known, found))
        return found

    # --- start and stop ---
    def start(self, name: str, report: Report, within_s: float = 60.0, *, stop_first: bool = False) -> EndpointStatus:
        """Start it and wait until Globus Compute reports it online. A running one is left alone, or stopped first.

        Raises:
            NotFound: it is not configured.
            ServiceError: it runs on another machine, ended, or is not online in time; with its own last output.
        """
        folder, record = self._globus / name, self._known_here(name)
        shared.check_files(record.options)
        with self._registrar(record.venv) as registrar:
            report("identity", "asking Globus")
            registrar.ask("login")  # here and now: the endpoint's own process has no terminal
            if stop_first:
                report("endpoint", "stopping")
                self.stop(name, keep_answers=True)
            running = self._running(name)
            report("endpoint", "waiting until it is online")
            deadline = time.monotonic() + within_s
            while True:
                found = self.status(name, registrar)
                if found.state == "online":
                    return found
                if not alive(running):
                    raise ServiceError(f"The endpoint '{name}' ended at once:\n{agent.last_words(folder)}")
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"The endpoint '{name}' runs, but is not online after {within_s:.0f} s "
                        f"({found.note or found.state}). Its log: {folder / 'endpoint.log'}"
                    )
                time.sleep(0.3)

    def _running(self, name: str) -> Mark:
        """Its process, started if there is none."""
        with self._records.locked():
            record = self._known_here(name)
            if record.process is not None and alive(record.process):
                return record.process
            if record.process is not None:
                self._pid_file(name).unlink(missing_ok=True)  # killed on this machine: it would refuse to start
            made = agent.spawn(self._globus / name, record.venv)
            self._records.write(name, record.model_copy(update={"process": made, "host": self._here}))
            return made

    def stop(self, name: str, *, host_is_gone: bool = False, keep_answers: bool = False) -> bool:
        """End it with all that belongs to it; waiting tasks run when it is back. ``False``: it did not run.

        ``host_is_gone``: its machine will never be back, forget what ran there. ``keep_answers``: keep those of the
        last hour, for packs that are repeated when it is back.

        Raises ``NotFound``, and ``ServiceError`` if it runs on another machine or does not end, or answers are left.
        """
        users: tuple[kept.User, ...] = ()
        with self._records.locked():
            record = self._records.known(name)
            gone = host_is_gone and record.elsewhere(self._here) is not None
            if not gone:
                self._known_here(name)
            ran = record.process is not None and (gone or alive(record.process))
            if ran and record.process is not None and not gone:
                family = (record.process, *descendants(record.process.pid))
                users = kept.users_of(self._site_file(name, record.options))
                left = end((record.process,), _STOP_S, kill_wait_s=5.0) + end(family, 5.0, kill_wait_s=5.0)
                if left:
                    raise ServiceError(
                        f"Processes {[known.pid for known in left]} of the endpoint '{name}' do not end."
                    )
            if ran:
                self._pid_file(name).unlink(missing_ok=True)
                self._records.write(name, record.model_copy(update={"process": None, "host": None}))
            if not keep_answers:
                kept.forget(record.answers, record.venv, users)
            return ran

    # --- status ---
    def ask_status(self, name: str) -> EndpointStatus:
        """Its status, here and at Globus Compute. Raises ``NotFound``."""
        with self._registrar(self._records.known(name).venv) as registrar:
            return self.status(name, registrar)

    def status(self, name: str, registrar: Registrar | None = None) -> EndpointStatus:
        """Its status here, and from the ``registrar`` if there is one. Raises ``NotFound``."""
        record = self._records.known(name)
        elsewhere = record.elsewhere(self._here)
        lives = elsewhere is None and alive(record.process)
        state, note = "stopped", None
        if lives or elsewhere:
            state, note = ("unknown", f"it was started on {elsewhere}") if elsewhere else ("starting", None)
            try:
                if registrar is not None and registrar.ask("status", endpoint=record.id)["status"] == "online":
                    state, note = "online", None
            except ServiceError as error:
                state, note = "unknown", error.message
        registered = {function.id: function for function in manifest.read(self._manifest)}
        return EndpointStatus(
            name=name,
            id=record.id,
            state=state,
            pid=record.process.pid if record.process is not None and lives else None,
            host=record.host if lives or elsewhere else None,
            functions=tuple(
                registered.get(known, manifest.Function(version="unknown", sha256="", id=known))
                for known in record.functions
            ),
            heartbeat_age_s=_age_s(self._pid_file(name)) if lives or elsewhere else None,
            tasks_done=kept.tasks_done(record.answers),
            note=note,
        )

    def names(self) -> tuple[str, ...]:
        """Those configured, sorted."""
        return self._records.names()

    def delete(self, name: str) -> None:
        """Stop it, remove it from Globus Compute and from here. Raises ``NotFound``, ``ServiceError``."""
        record = self._known_here(name)
        with self._registrar(record.venv) as registrar:
            registrar.ask("login")  # before it is stopped
            self.stop(name)
            registrar.ask("delete", endpoint=record.id)
        shutil.rmtree(self._globus / name, ignore_errors=True)
        kept.remove(record.answers)
        self._records.remove(name)

    def _known_here(self, name: str) -> EndpointRecord:
        """The record of one that does not run on another machine. Raises ``NotFound``, ``ServiceError``."""
        record = self._records.known(name)
        if (host := record.elsewhere(self._here)) is not None:
            raise ServiceError(
                f"The endpoint '{name}' was started on {host}: run this command there (if that machine is gone for "
                f"good, 'gateway endpoint stop {name} --host-is-gone' first)."
            )
        return record

    def _pid_file(self, name: str) -> Path:
        """The endpoint process's own, which it touches with each heartbeat."""
        return self._globus / name / "daemon.pid"

    def _site_file(self, name: str, options: Options) -> Path:
        """The function's site file."""
        return (options.shared_folder or self._root) / f"{name}.site.json"

    def _registrar(self, venv: Path) -> Registrar:
        if os.getuid() == 0:  # about to be run by root
            shared.check_environment(venv)
        return Registrar(venv, self._globus, self._pause)


def _is_own(url: str, layout: Layout) -> bool:
    """Whether the front door at ``url`` has a certificate of this gateway's authority; others sign none of loopback."""
    return url.startswith("https:") and on_loopback(url) and layout.ca.exists()


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
