"""What lies in the state folder before the parts start, and what is forgotten when they have ended."""

from __future__ import annotations

import contextlib
import json

from gateway_plugin.catalog import Catalog, catalog_document
from gateway_plugin.edge import process as edge_process
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.service import ray_head
from gateway_plugin.service.active_catalog import in_force
from gateway_plugin.service.discovery import edges_of
from gateway_plugin.service_state import RecordGarbled, ServiceRecord, read_record, write_record
from gateway_plugin.site import Site
from gateway_plugin.tls import make_authority


def provision(layout: Layout, site: Site, catalog: Catalog, record: ServiceRecord, keep: bool) -> str:
    """Write all that the parts read. ``keep``: routes, Ray's tables, token and authority of what lives on stay.

    Returns what was garbled and what was done about it, for people; as a rule nothing.

    Raises:
        OSError: the disk is full.
        ServiceError: a folder is somebody else's, or HAProxy refuses the edge's configuration.
    """
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
        edge_process.prepare(layout, site)
        edge_process.check(layout)
    write_record(layout, record)
    return recovered


def forget(layout: Layout) -> None:
    """What the parts remember of a run that is over: Ray's tables and folder, routes, the supervisor's status."""
    ray_head.forget(layout)
    for path in (layout.servers_state, layout.models_map, layout.slot_keys_map, layout.supervisor_status):
        path.unlink(missing_ok=True)
    # On a full disk the mark of a process that has ended stays, which says nothing; so does a garbled record.
    with contextlib.suppress(OSError, RecordGarbled):
        record = read_record(layout)
        if record is not None and record.supervisor is not None:
            write_record(layout, record.model_copy(update={"supervisor": None}))
