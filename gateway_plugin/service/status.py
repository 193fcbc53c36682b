"""``gateway status`` from three sources: the supervisor's status checked against live processes, the gateway's own
status over HTTP, and, if that does not answer, the edge's routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateway_plugin.connection import Connection, find_gateway, on_loopback
from gateway_plugin.errors import Forbidden, GatewayError, GatewayUnreachable, GoingDown, InvalidKey
from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark, age_s, alive
from gateway_plugin.service.discovery import edges_of, heads_of, supervisors_of
from gateway_plugin.service.draining import read_drain
from gateway_plugin.service.probes import answers
from gateway_plugin.service.supervisor_state import PartState, read_status
from gateway_plugin.service_state import RecordGarbled, ServiceRecord, on_this_host, read_record

_PARTS = ("supervisor", "edge", "head", "serve")

Ask = Callable[[Layout], Mapping[str, Any]]


def ask_gateway(layout: Layout) -> Mapping[str, Any]:
    """``GET /gateway/v1/status`` with the CLI's own admin key, within 5 s. Raises ``GatewayError``."""
    return _get(find_gateway(state=layout.state), "/gateway/v1/status")


def _get(found: Connection, path: str) -> Mapping[str, Any]:
    import httpx

    from gateway_plugin.api_types import parse_error
    from gateway_plugin.http_channel import not_a_gateway, unreachable

    base = found.url if found.door is None else "http://localhost"
    transport = None if found.door is None else httpx.HTTPTransport(uds=str(found.door))
    headers = {"Authorization": f"Bearer {found.key}"}
    try:
        with httpx.Client(
            transport=transport, verify=found.verify(), timeout=5.0, trust_env=not on_loopback(found.url)
        ) as client:
            response = client.get(f"{base}{path}", headers=headers)
        document: Mapping[str, Any] = response.json()
    except httpx.TransportError as error:
        raise unreachable(found.url, error, found.door is not None) from None
    except ValueError:
        raise not_a_gateway(found.url, path) from None
    if not response.is_success:
        raise parse_error(response.status_code, document, response.headers)
    return document


def report_elsewhere(found: Connection) -> dict[str, Any]:
    """The same document for a gateway on another machine: the status that it reports to this key.

    ``state``: ``ready``, ``starting``, ``stopping``, ``unreachable``, or ``degraded``: only its edge answers. Raises
    ``InvalidKey``.
    """
    head: dict[str, Any] = {"url": found.url, "site": None, "host": None, "parts": {}}
    try:
        try:
            gateway = _get(found, "/gateway/v1/status")
        except Forbidden:  # not an administrator's key
            gateway = {"state": "ready", "models": _get(found, "/v1/models")["data"]}
    except InvalidKey:
        raise
    except GatewayError as error:
        words = {GatewayUnreachable: "unreachable", GoingDown: "stopping"}
        word = words.get(type(error), "degraded")
        return {"state": word, **head, **_silent(error.message), "routes": []}
    word = "ready" if gateway.get("state") == "ready" else "starting"
    return {"state": word, **head, "gateway": gateway, "gateway_error": None, "routes": []}


def is_ready(layout: Layout) -> bool:
    """Whether ``gateway status`` reports ``ready``. Cheap while it does not."""
    return answers(layout, "/ready", 1.0) and report(layout.state)["state"] == "ready"


def report(state: Path, ask: Ask = ask_gateway) -> dict[str, Any]:
    """The full status of the gateway in ``state``.

    Returns ``{"state", "note"?, "url", "site", "host", "parts": {NAME: {"state","pid","age_s","restarts",
    "last_error"}}, "gateway": status over HTTP or None, "gateway_error", "routes": edge's servers if the gateway does
    not answer}``. ``state`` is one of: ``down``; ``ready``; ``starting``; ``degraded`` (a part is missing, warm
    requests may pass); ``stopping`` (with ``drain``: requests in flight and seconds left to them); ``remote`` (it runs
    on another machine, whose processes cannot be seen from here).
    """
    layout = Layout.of(state)
    record, note = _record(layout)
    if record is None:
        return {"state": "down", "url": None, "site": None, "host": None, "parts": {}, **_silent(None), "routes": []}
    here = on_this_host(record)
    parts = _parts(layout, record) if here else {}
    head: dict[str, Any] = {"note": note, "url": record.url or None, "site": record.site, "host": record.host}
    head["parts"] = parts
    if here and all(part["state"] in ("down", "dead") for part in parts.values()):
        return {"state": "down", **head, **_silent(None), "routes": []}
    drain = read_drain(layout) if here and _stopping(layout) else None
    if drain is not None:
        head["drain"] = {"in_flight": drain.in_flight, "left_s": drain.left_s}
    gateway: Mapping[str, Any] | None = None
    silence, routes = None, []
    try:
        gateway = ask(layout)
    except GatewayError as error:
        silence, routes = error.message, _routes(layout)
    said = "remote" if not here else "stopping" if _stopping(layout) else word(parts, gateway)
    return {"state": said, **head, "gateway": gateway, "gateway_error": silence, "routes": routes}


def _stopping(layout: Layout) -> bool:
    return bool(supervisors_of(layout)) and read_status(layout).stage == "stopping"


def _record(layout: Layout) -> tuple[ServiceRecord | None, str | None]:
    """The record, and its problem; a garbled one is rebuilt from live processes."""
    if not layout.state.is_dir():
        return None, None
    try:
        return read_record(layout), None
    except RecordGarbled as error:
        return ServiceRecord(supervisor=next(iter(supervisors_of(layout)), None)), error.message


def _silent(error: str | None) -> dict[str, Any]:
    return {"gateway": None, "gateway_error": error}


def word(parts: Mapping[str, Mapping[str, Any]], gateway: Mapping[str, Any] | None) -> str:
    """(1) All parts run and the gateway reports ready; (2) a part is gone, or was restarted; (3) else it starts."""
    states = {part["state"] for part in parts.values()}
    if gateway is not None and gateway.get("state") == "ready" and states == {"running"}:  # (1)
        return "ready"
    came_again = any(part["restarts"] for part in parts.values()) and states != {"running"}
    silent = gateway is None and any(part["restarts"] for part in parts.values())
    return "degraded" if came_again or silent or states - {"running", "starting", "down"} else "starting"  # (2), (3)


def _parts(layout: Layout, record: ServiceRecord) -> dict[str, dict[str, Any]]:
    status = read_status(layout)
    supervisor = record.supervisor if alive(record.supervisor) else next(iter(supervisors_of(layout)), None)
    supervised = supervisor is not None
    parts = {"supervisor": _part("running" if supervised else "dead", supervisor or record.supervisor, PartState())}
    if not supervised and record.supervisor is None:
        parts["supervisor"]["state"] = "down"
    for name, living in (("edge", edges_of), ("head", heads_of)):
        known = status.part(name).mark
        state = status.part(name).phase.value if alive(known) else "dead" if known is not None else "down"
        if not alive(known) and (found := living(layout)):  # the record is gone, or older than the supervisor
            known, state = found[0], "running"
        if not supervised and state == "starting":
            state = "running"  # no supervisor is left to record that it answers
        shut = _stopping(layout)  # and reports so to every caller
        if name == "edge" and state == "running" and not shut and not answers(layout, "/health", 1.0):
            state = "silent"
        parts[name] = _part(state, known if alive(known) else None, status.part(name))
    serve = status.part("serve").phase.value if supervised else "unknown"
    if parts["head"]["state"] in ("dead", "down"):
        serve = "down"
    parts["serve"] = _part(serve, None, status.part("serve"))
    if serve == "unknown" and answers(layout, "/ready", 1.0):
        parts["serve"]["state"] = "running"
    return {name: parts[name] for name in _PARTS}


def _part(state: str, known: Mark | None, noted: PartState) -> dict[str, Any]:
    return {
        "state": state,
        "pid": known.pid if known is not None else None,
        "age_s": round(age_s(known), 1) if known is not None else None,
        "restarts": noted.restarts,
        "last_error": noted.last_error,
    }


def _routes(layout: Layout) -> list[dict[str, Any]]:
    """The edge's open routes, read over its socket; empty if the edge does not answer either."""
    from gateway_plugin.edge.runtime import EdgeRuntime

    async def servers() -> list[dict[str, Any]]:
        edge = EdgeRuntime(layout)
        names: dict[int, str] = {}
        for name, slot in (await edge.tenants()).items():
            names.setdefault(slot, name)
        return [
            {
                "model": names.get(server.slot, "?"),
                "server": f"slot{server.slot}/{server.server}",
                "address": server.address,
                "state": "draining" if server.draining else "open" if server.up else "down",
                "in_flight": server.in_flight,
            }
            for server in await edge.servers()
        ]

    try:
        return asyncio.run(servers())
    except (GatewayError, OSError):
        return []
