"""Probes of a gateway's doors over the network."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import httpx

from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark
from gateway_plugin.service.discovery import has_application, parts_run, programs_below
from gateway_plugin.service.listeners import taken_by_another_user
from gateway_plugin.service_state import ServiceRecord

ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - where Ray listens


def answers(layout: Layout, path: str, timeout_s: float) -> bool:
    """Whether ``GET path`` at the front door returns 200."""
    return asked(layout, path, timeout_s) == 200


def asked(layout: Layout, path: str, timeout_s: float) -> int | None:
    """The status of ``GET path`` at the front door, over the owner's socket: no other program can answer there.

    ``None``: no answer.
    """
    transport = httpx.HTTPTransport(uds=str(layout.owner_door), verify=False)  # no TLS: no certificates to load
    try:
        with httpx.Client(transport=transport, timeout=timeout_s, trust_env=False) as client:
            return client.get(f"http://localhost{path}").status_code
    except httpx.TransportError:
        return None


def connects(address: str, port: int, timeout_s: float) -> bool:
    """Whether the address accepts a TCP connection."""
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Probes:
    """Results of network probes, made in a thread: they may take longer than one look of the supervisor."""

    edge_answers: bool = False
    head_answers: bool = False
    ready: bool = False
    busy: bool = False
    head_whole: bool = True
    port_lost: str = ""
    """While the head starts: the other user that has Ray's port."""


def probe(layout: Layout, record: ServiceRecord, head: Mark | None, *, starting: bool) -> Probes:
    """Run all probes. ``starting``: the head starts, and another user may have its port."""
    edge = answers(layout, "/health", 1.0)
    whole = head is not None and parts_run(head)
    head_answers = whole and connects(record.head_address, record.ray_port, 0.5)
    # Without a head the application cannot answer, and the edge would try for seconds.
    ready = asked(layout, "/ready", 2.0) if edge and head_answers else None
    return Probes(
        edge_answers=edge,
        head_answers=head_answers,
        ready=ready == 200,
        busy=ready is None and head is not None and has_application(programs_below(head)),
        head_whole=whole,
        port_lost=taken_by_another_user("Ray", record.ray_port, ANY_ADDRESS) if starting else "",
    )
