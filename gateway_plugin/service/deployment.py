"""One gateway as a value: the paths of its files, its site with the ports in force, and the record that ``up`` wrote.

Every process of the service builds it once and passes it on: ``up`` and ``doctor`` from their arguments, the supervisor
and the drivers it starts from ``service.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from gateway_plugin.catalog import Catalog, catalog_document
from gateway_plugin.edge import process as edge_process
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.service import ray_head
from gateway_plugin.service.active_catalog import in_force
from gateway_plugin.service.discovery import edges_of
from gateway_plugin.service_state import RecordGarbled, ServiceRecord, read_record, write_record
from gateway_plugin.site import WILDCARDS, Site, load_site
from gateway_plugin.tls import make_authority


@dataclass(frozen=True)
class Deployment:
    """One gateway."""

    layout: Layout
    site: Site
    """The site with the port given to ``up``."""
    record: ServiceRecord

    def with_catalog(self, file: Path) -> Deployment:
        """The same, with the file of its catalog."""
        return replace(self, record=self.record.model_copy(update={"catalog": str(file.expanduser().resolve())}))

    @property
    def ray_address(self) -> str:
        """``IP:port`` of the Ray head."""
        return f"{self.record.head_address}:{self.record.ray_port}"


def noted(layout: Layout) -> Deployment:
    """The gateway that ``up`` recorded in ``layout``. Raises ``ServiceError`` if there is none, ``ConfigError`` if its
    site cannot be loaded."""
    record = read_record(layout)
    if record is None:
        raise ServiceError(f"{layout.service_json} is missing; 'gateway up' writes it.")
    return deployment_of(layout, record)


def deployment_of(layout: Layout, record: ServiceRecord) -> Deployment:
    """The gateway of ``record``. Raises ``ConfigError`` if its site cannot be loaded."""
    return Deployment(layout, site_with_port(record.site_reference, record.port or None), record)


def planned(
    layout: Layout,
    known: ServiceRecord | None,
    reference: str | None,
    port: int | None,
    address_of: Callable[[Site], str] = ray_head.head_address,
) -> Deployment:
    """The gateway that ``up`` with these arguments starts; missing ones are taken from ``known``, the last record.

    Raises ``ConfigError``: the site cannot be loaded, or lacks its environment.
    """
    if reference is None and known is not None:
        reference, port = known.site_reference or None, port or known.port or None
    reference = reference or "local"
    site = site_with_port(reference, port)
    site.demand_environment(os.environ)
    record = record_of(site, reference, Path(known.catalog if known is not None else ""), address_of(site))
    return Deployment(layout, site, record)


def with_port(site: Site, port: int | None) -> Site:
    """``site`` with another port for the front door. Raises ``ValidationError`` (pydantic) for an impossible one."""
    if port is None or port == site.port:
        return site
    return Site(**{**dict(site), "port": port})


def site_with_port(reference: str, port: int | None) -> Site:
    """The site loaded from ``reference``, with ``port`` for the front door if one is given. Raises ``ConfigError``."""
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
        host=socket.gethostname(),
    )


def _own_name() -> str:
    """This machine's full name; the short one if the full name is ``localhost``."""
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def provision(gateway: Deployment, catalog: Catalog, keep: bool) -> str:
    """Write all files that the parts read. ``keep``: routes, Ray's tables, token and authority of live parts stay.

    Returns a message for the user on garbled files and their handling; normally empty.

    Raises:
        OSError: the disk is full.
        ServiceError: a folder is another user's, or HAProxy rejects the edge's configuration.
    """
    layout = gateway.layout
    layout.make()
    if not keep:
        forget(layout)
        layout.make()
    make_authority(layout)
    ray_head.make_secrets(layout, keep)
    if not keep or in_force(layout) is None:
        write_private(layout.catalog_json, json.dumps(catalog_document(catalog), indent=1))
    store = KeyStore(layout)
    recovered = store.recover()
    store.keep_cli_key()
    if not edges_of(layout):
        edge_process.prepare(layout, gateway.site)
        edge_process.check(layout)
    write_record(layout, gateway.record)
    return recovered


def forget(layout: Layout) -> None:
    """Remove the state of a run that has ended: Ray's tables and folder, routes, the supervisor's status."""
    ray_head.forget(layout)
    for path in (layout.servers_state, layout.models_map, layout.slot_keys_map, layout.supervisor_status):
        path.unlink(missing_ok=True)
    # On a full disk the mark of an ended process stays, which has no effect; so does a garbled record.
    with contextlib.suppress(OSError, RecordGarbled):
        record = read_record(layout)
        if record is not None and record.supervisor is not None:
            write_record(layout, record.model_copy(update={"supervisor": None}))
