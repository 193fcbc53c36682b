"""An endpoint's life: configured, started, stopped, looked at, deleted; the real ``globus-compute-endpoint`` serves.

State lies in ``endpoints/`` of the state folder: the environment, the manifest of functions, one folder an endpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gateway_plugin.compute import config, environment, manifest
from gateway_plugin.compute.config import EndpointSettings
from gateway_plugin.compute.service import Registrar
from gateway_plugin.errors import ConfigError, NotFound, ServiceError
from gateway_plugin.layout import Layout, private_folder, write_private
from gateway_plugin.service import processes
from gateway_plugin.service.processes import Mark, read_mark

Report = Callable[[str, str], None]
"""Told each step: what, and how far."""

_STOP_S = 20.0


@dataclass(frozen=True)
class EndpointStatus:
    """What is known of one endpoint."""

    name: str
    id: str
    state: str
    """``online``; ``starting``: it runs, Globus has not heard; ``stopped``; ``unknown``: Globus cannot be asked."""
    pid: int | None
    functions: tuple[manifest.Function, ...]
    heartbeat_age_s: float | None
    """Since the process last gave a sign of life."""
    tasks_done: int
    note: str | None = None

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


class Endpoints:
    """The endpoints of one gateway's state folder."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._root = layout.state / "endpoints"
        self._globus = self._root / "globus"
        self._manifest = self._root / "functions.json"

    # --- configure ---
    def configure(
        self, settings: EndpointSettings, report: Report, *, venv: Path | None = None, shared: Path | None = None
    ) -> EndpointStatus:
        """Write everything that ``settings`` say, make the environment, register function and endpoint.

        ``venv``: an environment that is there already; ``shared``: the folder that all local users of a multi-user
        endpoint can read, for environment and site file. Running again changes what is configured.

        Raises:
            ConfigError: this cannot be an endpoint here.
            ServiceError: the environment cannot be made, or Globus Compute refuses.
        """
        _check_user(settings, shared)
        private_folder(self._layout.state)
        private_folder(self._root)
        place = shared if shared is not None else self._root
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        used = (venv or place / "venv").absolute()
        if venv is None:
            environment.make(used, lambda words: report("environment", words))
        elif not environment.program(used).exists():
            raise ConfigError(f"{used} has no globus-compute-endpoint; leave --venv out to have one made.")
        report("environment", "ready")
        private_folder(self._globus)
        folder = private_folder(self._globus / settings.name)
        with self._registrar(used) as registrar:
            report("identity", "asking Globus")
            settings = _with_owner(settings, registrar.ask("identity"))
            report("function", "registering")
            function = self._register_function(registrar)
            report("function", function.id)
            site_file = place / f"{settings.name}.site.json"
            write_private(site_file, json.dumps(config.site_document(settings), indent=1) + "\n")
            if shared is not None:
                site_file.chmod(0o644)  # no secret in it, and every mapped user reads it
            write_private(folder / "config.yaml", config.core_yaml(settings, (function.id,)))
            write_private(folder / "user_config_template.yaml.j2", config.template(settings))
            write_private(folder / "user_config_schema.json", config.schema())
            write_private(folder / "user_environment.yaml", config.user_environment(site_file, used))
            report("endpoint", "registering")
            endpoint = str(registrar.ask("register_endpoint", folder=str(folder)))
            report("endpoint", endpoint)
        record = self._record(settings.name)
        record |= {"id": endpoint, "venv": str(used), "functions": [function.id], "answers": settings.answers}
        self._write_record(settings.name, record)
        return self.status(settings.name)

    def _register_function(self, registrar: Registrar) -> manifest.Function:
        text = manifest.source()
        known = manifest.read(self._manifest)
        found = manifest.registered(known, text)
        if found is None:
            version = manifest.version_of(text)
            words = f"gateway-plugin {version}: asks a site's gateway"
            given = registrar.ask("register_function", source=text, entry_point=manifest.ENTRY_POINT, description=words)
            found = manifest.Function(version, manifest.digest_of(text), str(given))
            manifest.write(self._manifest, (*known, found))
        return found

    # --- start and stop ---
    def start(self, name: str, report: Report, within_s: float = 60.0) -> EndpointStatus:
        """Start it and wait until Globus Compute says that it is online. One that runs is left alone.

        Raises:
            NotFound: it is not configured.
            ServiceError: it ended, or is not online in time; the message has its own last words.
        """
        record = self._known(name)
        folder, venv = self._globus / name, Path(record["venv"])
        running = read_mark(record.get("process"))
        if not processes.alive(running):
            (folder / "daemon.pid").unlink(missing_ok=True)  # of one that was killed: it would refuse to start
            running = self._spawn(name, folder, venv)
            self._write_record(name, {**record, "process": running.document()})
        deadline = time.monotonic() + within_s
        report("endpoint", "waiting until it is online")
        with self._registrar(venv) as registrar:
            while True:
                found = self.status(name, registrar)
                if found.state == "online":
                    return found
                if not processes.alive(running):
                    raise ServiceError(f"The endpoint '{name}' ended at once:\n{_last_words(folder)}")
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"The endpoint '{name}' runs, but is not online after {within_s:.0f} s "
                        f"({found.note or found.state}). Its log: {folder / 'endpoint.log'}"
                    )
                time.sleep(0.3)

    def _spawn(self, name: str, folder: Path, venv: Path) -> Mark:
        with (folder / "console.log").open("wb") as log:
            (folder / "console.log").chmod(0o600)
            child = subprocess.Popen(
                [str(environment.program(venv)), "start", name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=config.process_environment(os.environ, venv, self._globus),
                cwd=folder,
                start_new_session=True,
            )
        found = processes.mark(child.pid)
        if found is None:
            child.wait()
            raise ServiceError(f"The endpoint '{name}' ended at once:\n{_last_words(folder)}")
        return found

    def stop(self, name: str) -> bool:
        """End it with all that belongs to it; tasks that wait run when it is back. ``False``: it did not run."""
        record = self._known(name)
        running = read_mark(record.get("process"))
        if running is None or not processes.alive(running):
            return False
        family = (running, *processes.descendants(running.pid))
        left = processes.end((running,), grace_s=_STOP_S) + processes.end(family, grace_s=5.0)
        if left:
            raise ServiceError(f"Processes {[known.pid for known in left]} of the endpoint '{name}' do not end.")
        self._write_record(name, {**record, "process": None})
        return True

    # --- look ---
    def ask_status(self, name: str) -> EndpointStatus:
        """What is known of it, here and at Globus Compute. Raises ``NotFound``."""
        with self._registrar(self._known(name)["venv"]) as registrar:
            return self.status(name, registrar)

    def status(self, name: str, registrar: Registrar | None = None) -> EndpointStatus:
        """What is known of it here, and by the ``registrar`` if there is one. Raises ``NotFound``."""
        record = self._known(name)
        running = read_mark(record.get("process"))
        lives = processes.alive(running)
        state, note = "stopped", None
        if lives:
            state = "starting"
            try:
                if registrar is not None and registrar.ask("status", endpoint=record["id"])["status"] == "online":
                    state = "online"
            except ServiceError as error:
                state, note = "unknown", error.message
        allowed = tuple(f for f in manifest.read(self._manifest) if f.id in record["functions"])
        return EndpointStatus(
            name=name,
            id=record["id"],
            state=state,
            pid=running.pid if running is not None and lives else None,
            functions=allowed,
            heartbeat_age_s=_age_s(self._globus / name / "daemon.pid") if lives else None,
            tasks_done=_tasks_done(Path(record["answers"])),
            note=note,
        )

    def names(self) -> tuple[str, ...]:
        """Those configured, sorted."""
        return tuple(sorted(path.stem for path in self._root.glob("*.endpoint")))

    def delete(self, name: str) -> None:
        """Stop it, remove it from Globus Compute and from here. Raises ``NotFound``, ``ServiceError``."""
        record = self._known(name)
        self.stop(name)
        with self._registrar(record["venv"]) as registrar:
            registrar.ask("delete", endpoint=record["id"])
        shutil.rmtree(self._globus / name, ignore_errors=True)
        self._path(name).unlink()

    # --- records ---
    def _path(self, name: str) -> Path:
        return self._root / f"{name}.endpoint"

    def _record(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise ServiceError(f"{self._path(name)} is damaged; run 'gateway endpoint configure' again.") from None
        return dict(found)

    def _known(self, name: str) -> dict[str, Any]:
        record = self._record(name) if config.ENDPOINT_NAME.fullmatch(name) else {}
        if not record:
            raise NotFound(f"There is no endpoint '{name}' here; 'gateway endpoint configure' makes one.")
        return record

    def _write_record(self, name: str, record: dict[str, Any]) -> None:
        write_private(self._path(name), json.dumps(record, indent=1) + "\n")

    def _registrar(self, venv: str | Path) -> Registrar:
        return Registrar(Path(venv), self._globus)


def _check_user(settings: EndpointSettings, shared: Path | None) -> None:
    multi = settings.identity_mapping is not None
    if multi and os.getuid() != 0:
        raise ConfigError(
            "A multi-user endpoint becomes each mapped user, which needs root; or leave --multi-user out."
        )
    if multi and shared is None:
        raise ConfigError("A multi-user endpoint needs --shared-folder, a folder that every mapped user can read.")
    if not multi and os.getuid() == 0:
        raise ConfigError("As root an endpoint must be --multi-user; configure a single-user one as an ordinary user.")


def _with_owner(settings: EndpointSettings, owner: object) -> EndpointSettings:
    return settings if settings.identity_mapping is not None else replace(settings, owner=str(owner))


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _tasks_done(answers: Path) -> int:
    """Each task leaves one byte in its user's tally (``gateway_plugin.compute.function.count_task``)."""
    total = 0
    for tally in answers.parent.glob(f"{answers.name}-*/tally"):
        try:
            total += tally.stat().st_size
        except OSError:
            continue
    return total


def _last_words(folder: Path) -> str:
    lines: list[str] = []
    for name in ("console.log", "endpoint.log"):
        try:
            lines += (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
        except OSError:
            continue
    return "\n".join(lines) or "(it said nothing)"
