"""Keys that changed while the edge was unreachable: the supervisor synchronises them every second."""

from __future__ import annotations

import logging
import threading

from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.errors import GatewayError
from gateway_plugin.paths import Layout

log = logging.getLogger("gateway.supervisor")

_EVERY_S = 1.0


def keep_keys_in_force(layout: Layout, stop: threading.Event) -> None:
    """Keep ``keys.map`` and the running edge equal to the store, until ``stop`` is set. Logs one line per change."""
    store = KeyStore(layout)
    said = ""
    while not stop.wait(_EVERY_S):
        try:
            store.keep_in_force()
            problem = ""
        except (OSError, GatewayError) as error:
            problem = str(error)
        if problem != said:
            log.warning("keys %s", problem or "in force again")
        said = problem
