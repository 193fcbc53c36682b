"""What is written down of a running gateway: ``service.json`` (``up``) and ``supervisor.json`` (the supervisor)."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.identity import Mark, read_mark
from gateway_plugin.layout import Layout, write_private
from gateway_plugin.service.plan import Part, Phase, Plan
from gateway_plugin.site import WILDCARDS, Site, load_site


@dataclass(frozen=True)
class ServiceRecord:
    """``service.json``: what ``up`` was asked for, and who keeps it running."""

    site: str
    site_reference: str
    """What ``load_site`` takes; a file's path is absolute."""
    catalog: str
    """The file that the catalog came from; ``catalog.json`` holds what is in force."""
    url: str
    bind: str
    port: int
    tls: bool
    head_address: str
    ray_port: int
    serve_port: int
    host: str
    """Name of the machine it runs on; PIDs mean nothing on another."""
    supervisor: Mark | None = None
    own_certificate: bool = False
    """The front door's certificate is signed by the gateway's own authority. Earlier versions did not write this."""

    def document(self) -> dict[str, Any]:
        """The JSON document, as in docs/design.md (Seams)."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "supervisor"}
        return {**fields, "supervisor": self.supervisor.document() if self.supervisor else None}

    def load_site(self) -> Site:
        """The site, with the port that ``up`` was given. Raises ``ConfigError``."""
        return with_port(load_site(self.site_reference), self.port)


def with_port(site: Site, port: int | None) -> Site:
    """``site`` with another port for the front door. Raises ``ValidationError`` (pydantic) for an impossible one."""
    if port is None or port == site.port:
        return site
    return Site(**{**dict(site), "port": port})


def site_with_port(reference: str, port: int | None) -> Site:
    """The site called ``reference``, with ``port`` for the front door if one is given. Raises ``ConfigError``."""
    try:
        return with_port(load_site(reference), port)
    except ValidationError as error:
        raise ConfigError(f"--port {port}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def record_of(site: Site, site_reference: str, catalog: Path, head_address: str) -> ServiceRecord:
    """The record of a gateway that is about to start."""
    reference = site_reference
    if reference.endswith(".py") or "/" in reference:
        reference = str(Path(reference).expanduser().resolve())
    host = _own_name() if site.bind in WILDCARDS else site.bind
    scheme = "http" if site.plain_http else "https"
    return ServiceRecord(
        site=site.name,
        site_reference=reference,
        catalog=str(catalog.expanduser().resolve()),
        url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{site.port}",
        bind=site.bind,
        port=site.port,
        tls=not site.plain_http,
        own_certificate=not site.plain_http and site.certificate is None,
        head_address=head_address,
        ray_port=site.ray_port,
        serve_port=site.serve_port,
        host=socket.gethostname(),
    )


def _own_name() -> str:
    """This machine's full name; the short one where it has no other but ``localhost``."""
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def read_record(layout: Layout) -> ServiceRecord | None:
    """The record in ``service.json``; ``None`` if there is none. Raises ``ServiceError`` if it cannot be read."""
    document = _read_json(layout.service_json)
    if document is None:
        return None
    known = {"own_certificate": False, **document}
    fields: dict[str, Any] = {
        name: known.get(name) for name in ServiceRecord.__dataclass_fields__ if name != "supervisor"
    }
    if any(value is None for value in fields.values()):
        raise ServiceError(f"{layout.service_json} is not of this version; end what runs and remove it.")
    return ServiceRecord(**fields, supervisor=read_mark(document.get("supervisor")))


def record_here(layout: Layout) -> ServiceRecord | None:
    """The gateway's record. Raises ``ServiceError`` if it runs on another machine."""
    record = read_record(layout)
    if record is not None and not on_this_host(record) and record.supervisor is not None:
        raise ServiceError(
            f"the gateway of {layout.state} runs on {record.host}: run this command there "
            f"(if that machine is gone for good, remove {layout.service_json})."
        )
    return record


def write_record(layout: Layout, record: ServiceRecord) -> None:
    """Write ``service.json``, 0600, atomically."""
    write_private(layout.service_json, json.dumps(record.document(), indent=2) + "\n")


def plan_document(plan: Plan, stage: str, supervisor: Mark, now: float) -> dict[str, Any]:
    """``supervisor.json``: ``{"stage", "updated", "supervisor", "parts": {NAME: {...}}}``."""
    return {
        "stage": stage,
        "updated": now,
        "supervisor": supervisor.document(),
        "parts": {name: _part_document(getattr(plan, name)) for name in ("edge", "head", "serve")},
    }


def _part_document(part: Part) -> dict[str, Any]:
    return {
        "phase": part.phase.value,
        **(part.mark.document() if part.mark else {"pid": None, "started": None}),
        "since": part.since,
        "restarts": part.restarts,
        "deaths": part.deaths,
        "retry_at": part.retry_at,
        "last_error": part.error,
    }


def read_status(layout: Layout) -> dict[str, Any] | None:
    """The last ``supervisor.json``; ``None`` if there is none."""
    return _read_json(layout.supervisor_status)


def part_mark(status: Mapping[str, Any] | None, part: str) -> Mark | None:
    """The recorded process of ``part`` (``edge``, ``head``, ``serve``), alive or not."""
    if status is None:
        return None
    return read_mark(status.get("parts", {}).get(part))


def part_phase(status: Mapping[str, Any] | None, part: str) -> Phase:
    """The phase that the supervisor wrote last."""
    if status is None:
        return Phase.DOWN
    return Phase(status.get("parts", {}).get(part, {}).get("phase", "down"))


def on_this_host(record: ServiceRecord) -> bool:
    """Whether the recorded PIDs are of this machine."""
    return record.host == socket.gethostname()


def answers(layout: Layout, path: str, timeout_s: float) -> bool:
    """Whether ``GET path`` at the front door says 200."""
    return asked(layout, path, timeout_s) == 200


def asked(layout: Layout, path: str, timeout_s: float) -> int | None:
    """The status of ``GET path`` at the front door, asked over the owner's socket: nobody else can answer there.

    ``None``: no answer.
    """
    transport = httpx.HTTPTransport(uds=str(layout.owner_door), verify=False)  # no TLS: no certificates to load
    try:
        with httpx.Client(transport=transport, timeout=timeout_s, trust_env=False) as client:
            return client.get(f"http://localhost{path}").status_code
    except httpx.TransportError:
        return None


def connects(address: str, port: int, timeout_s: float) -> bool:
    """Whether something accepts a TCP connection there."""
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ServiceError(f"{path} cannot be read: {error}; if the gateway is down, remove it.") from None
    if not isinstance(document, dict):
        raise ServiceError(f"{path} cannot be read: expected a JSON object.")
    return document
