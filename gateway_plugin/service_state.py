"""``service.json``: the options of ``gateway up``, and the supervisor that keeps the gateway running."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field, StrictBool, StrictInt

from gateway_plugin.errors import ServiceError
from gateway_plugin.files import Garbled, read_object, set_aside, with_copy
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark
from gateway_plugin.state_file import LenientState, StateFile


class ServiceRecord(LenientState):
    """``service.json``: the options of ``up``, and the supervisor that keeps the gateway running."""

    site: str = ""
    site_reference: str = ""
    """The argument of ``load_site``; a file's path is absolute."""
    catalog: str = ""
    """The file that the catalog came from; ``catalog.json`` holds the catalog in force."""
    url: str = ""
    bind: str = ""
    port: StrictInt = 0
    tls: StrictBool = True
    head_address: str = ""
    ray_port: StrictInt = 0
    host: str = Field(default_factory=socket.gethostname)
    """Name of the machine it runs on; PIDs have no meaning on another."""
    supervisor: Mark | None = None
    own_certificate: StrictBool = False
    """The front door's certificate is signed by the gateway's own authority."""

    def contradicts(self, other: ServiceRecord) -> bool:
        """Whether it is of another gateway than ``other``: missing fields contradict nothing."""
        names = ("site_reference", "url", "bind", "port", "head_address", "ray_port", "host")
        return any(getattr(self, name) not in ("", 0, getattr(other, name)) for name in names)


class RecordGarbled(ServiceError):
    """``service.json`` exists and cannot be parsed, and there is no copy of it."""


def read_record(layout: Layout) -> ServiceRecord | None:
    """The record in ``service.json``, or if that is garbled or missing the supervisor's copy of it; ``None`` if there
    is neither.

    Raises ``RecordGarbled`` if neither can be parsed, ``ServiceError`` if it cannot be read.
    """
    try:
        document = with_copy(layout.service_json, layout.supervisor_status, "service")
    except Garbled as error:
        raise RecordGarbled(f"{error}; 'gateway up' and 'down' set it aside.") from None
    except OSError as error:
        raise ServiceError(f"{layout.service_json} cannot be read: {error.strerror}.") from None
    return None if document is None else ServiceRecord.model_validate(document)


def recover_record(layout: Layout) -> str:
    """Where ``service.json`` is garbled: set it aside, and replace it by the supervisor's copy if there is one, else
    by the site that the Ray head was started for.

    Returns a message about what was done; empty if nothing was. On a full disk the supervisor's copy is used in place.
    Raises ``ServiceError`` if no repair is possible.
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
            aside = _file(layout).replace_garbled(ServiceRecord.model_validate(known))
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
    _file(layout).write(record)


def mend_record(layout: Layout, record: ServiceRecord) -> Path | None:
    """Write ``service.json`` if it is missing or garbled. Returns the new name of the garbled file.

    Raises ``OSError``; nothing was changed then.
    """
    try:
        if _file(layout).read() is None:
            write_record(layout, record)
    except Garbled:
        return _file(layout).replace_garbled(record)
    return None


def _file(layout: Layout) -> StateFile[ServiceRecord]:
    return StateFile(layout.service_json, ServiceRecord)


def _copy(layout: Layout) -> dict[str, Any] | None:
    with suppress(Garbled):
        return with_copy(layout.service_json, layout.supervisor_status, "service")
    try:
        return {"site_reference": (read_object(layout.cluster_yaml) or {})["provider"]["site"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def on_this_host(record: ServiceRecord) -> bool:
    """Whether the recorded PIDs are of this machine."""
    return record.host == socket.gethostname()
