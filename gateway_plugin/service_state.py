"""What is written down of a running gateway: ``service.json`` (``up``) and ``supervisor.json`` (the supervisor)."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, read_mark
from gateway_plugin.service.restart_policy import Part, Phase, Plan
from gateway_plugin.site import WILDCARDS, Site, load_site
from gateway_plugin.state_file import Garbled, read_object, replace_garbled, set_aside, with_copy, write_private


@dataclass(frozen=True)
class ServiceRecord:
    """``service.json``: what ``up`` was asked for, and who keeps it running. Defaults: what an earlier version did not
    write, and what cannot be understood."""

    site: str = ""
    site_reference: str = ""
    """What ``load_site`` takes; a file's path is absolute."""
    catalog: str = ""
    """The file that the catalog came from; ``catalog.json`` holds what is in force."""
    url: str = ""
    bind: str = ""
    port: int = 0
    tls: bool = True
    head_address: str = ""
    ray_port: int = 0
    serve_port: int = 0
    host: str = field(default_factory=socket.gethostname)
    """Name of the machine it runs on; PIDs mean nothing on another."""
    supervisor: Mark | None = None
    own_certificate: bool = False
    """The front door's certificate is signed by the gateway's own authority."""
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What a later version wrote: kept."""

    def document(self) -> dict[str, Any]:
        """The JSON document, as in docs/design.md (Seams)."""
        known = {name: getattr(self, name) for name in _KEYS}
        return {**self.more, **known, "supervisor": self.supervisor.document() if self.supervisor else None}

    def contradicts(self, other: ServiceRecord) -> bool:
        """Whether it is of another gateway than ``other``: what it does not say contradicts nothing."""
        names = ("site_reference", "url", "bind", "port", "head_address", "ray_port", "serve_port", "host")
        return any(getattr(self, name) not in ("", 0, getattr(other, name)) for name in names)

    def load_site(self) -> Site:
        """The site, with the port that ``up`` was given. Raises ``ConfigError``."""
        return with_port(load_site(self.site_reference), self.port or None)


_KEYS = tuple(one.name for one in fields(ServiceRecord) if one.name not in ("supervisor", "more"))


class RecordGarbled(ServiceError):
    """``service.json`` is there and cannot be understood, nor is there a copy of it."""


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
    """The record in ``service.json``, or where that is garbled or missing the supervisor's copy of it; ``None`` if
    there is neither.

    Raises ``RecordGarbled`` if neither can be understood, ``ServiceError`` if it cannot be read.
    """
    try:
        document = with_copy(layout.service_json, layout.supervisor_status, "service")
    except Garbled as error:
        raise RecordGarbled(f"{error}; 'gateway up' and 'down' set it aside.") from None
    except OSError as error:
        raise ServiceError(f"{layout.service_json} cannot be read: {error.strerror}.") from None
    return None if document is None else record_from(document)


def record_from(document: Mapping[str, Any]) -> ServiceRecord:
    """The record in a document of any version: what is missing, or is of another type, is as if it was not written."""
    usual = ServiceRecord()
    known = {name: document[name] for name in _KEYS if type(document.get(name)) is type(getattr(usual, name))}
    more = {name: value for name, value in document.items() if name not in (*_KEYS, "supervisor")}
    return ServiceRecord(**known, supervisor=read_mark(document.get("supervisor")), more=more)


def recover_record(layout: Layout) -> str:
    """Where ``service.json`` is garbled: set it aside, and put the supervisor's copy in its place if there is one, else
    the site that the Ray head was started for.

    Returns what was done, for people; empty where nothing was. On a full disk the supervisor's copy serves where it is.
    Raises ``ServiceError`` if nothing can be done.
    """
    path = layout.service_json
    try:
        try:
            read_object(path)
        except Garbled as error:
            known = _copy(layout)
            if known is None:
                aside = set_aside(path)
                return f"{error}: it is {aside.name} now; site and catalog are not known (--site, --models)."
            aside = replace_garbled(path, _text(record_from(known)))
            return f"{error}: it is {aside.name} now, and what the gateway had noted elsewhere is in its place."
    except OSError as error:
        words = f"{path} cannot be read or replaced: {error.strerror}."
        try:
            read_record(layout)
        except ServiceError:
            raise ServiceError(words) from None
        return words
    return ""


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
    write_private(layout.service_json, _text(record))


def mend_record(layout: Layout, record: ServiceRecord) -> Path | None:
    """Write ``service.json`` where it is missing or garbled. Returns what a garbled one is called now.

    Raises ``OSError``; nothing was changed then.
    """
    try:
        if read_object(layout.service_json) is None:
            write_record(layout, record)
    except Garbled:
        return replace_garbled(layout.service_json, _text(record))
    return None


def _text(record: ServiceRecord) -> str:
    return json.dumps(record.document(), indent=2) + "\n"


def _copy(layout: Layout) -> dict[str, Any] | None:
    try:
        return with_copy(layout.service_json, layout.supervisor_status, "service")
    except Garbled:
        pass
    try:
        return {"site_reference": (read_object(layout.cluster_yaml) or {})["provider"]["site"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def plan_document(
    plan: Plan, stage: str, supervisor: Mark, now: float, service: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``supervisor.json``: ``{"stage", "updated", "supervisor", "parts": {NAME: {...}}, "service"}``: the last is a
    copy of the record, on another disk than that."""
    return {
        "service": dict(service or {}),
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
    """The last ``supervisor.json``, parts of any version made whole; ``None`` if there is none that can be understood:
    the supervisor writes it again."""
    try:
        document = read_object(layout.supervisor_status)
    except (OSError, Garbled):
        return None
    if document is None:
        return None
    found = document.get("parts")
    parts = found if isinstance(found, dict) else {}
    whole = {name: {**_part_document(Part()), **part} for name, part in parts.items() if isinstance(part, dict)}
    return {**document, "parts": whole}


def part_mark(status: Mapping[str, Any] | None, part: str) -> Mark | None:
    """The recorded process of ``part`` (``edge``, ``head``, ``serve``), alive or not."""
    if status is None:
        return None
    return read_mark(status.get("parts", {}).get(part))


def part_phase(status: Mapping[str, Any] | None, part: str) -> Phase:
    """The phase that the supervisor wrote last."""
    if status is None:
        return Phase.DOWN
    said = status.get("parts", {}).get(part, {}).get("phase")
    return Phase(said) if said in set(Phase) else Phase.DOWN


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
