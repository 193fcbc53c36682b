"""``gateway status``: the truth from three sources: the supervisor's notes checked against living processes, the
gateway's own status over HTTP, and, where that is silent, the edge's routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateway_plugin.errors import GatewayError, GatewayUnreachable
from gateway_plugin.identity import Mark, age_s, alive
from gateway_plugin.layout import Layout
from gateway_plugin.service.living import edges_of, heads_of, supervisors_of
from gateway_plugin.service.record import (
    RecordGarbled,
    ServiceRecord,
    answers,
    on_this_host,
    part_mark,
    part_phase,
    read_record,
    read_status,
)

_PARTS = ("supervisor", "edge", "head", "serve")

Ask = Callable[[Layout], Mapping[str, Any]]


def ask_gateway(layout: Layout) -> Mapping[str, Any]:
    """``GET /gateway/v1/status`` with the CLI's own admin key, within 5 s. Raises ``GatewayError``."""
    import httpx

    from gateway_plugin.answers import parse_error
    from gateway_plugin.locate import find_gateway

    found = find_gateway(state=layout.state)
    base = found.url if found.door is None else "http://localhost"
    transport = None if found.door is None else httpx.HTTPTransport(uds=str(found.door))
    headers = {"Authorization": f"Bearer {found.key}"}
    try:
        with httpx.Client(transport=transport, verify=found.verify(), timeout=5.0, trust_env=False) as client:
            response = client.get(f"{base}/gateway/v1/status", headers=headers)
        document: Mapping[str, Any] = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise GatewayUnreachable(f"{found.url} does not answer ({type(error).__name__}: {error})") from None
    if not response.is_success:
        raise parse_error(response.status_code, document, response.headers)
    return document


def report(state: Path, ask: Ask = ask_gateway) -> dict[str, Any]:
    """All there is to say of the gateway in ``state``.

    Returns ``{"state", "note"?, "url", "site", "host", "parts": {NAME: {"state","pid","age_s","restarts",
    "last_error"}}, "gateway": status over HTTP or None, "gateway_error", "routes": edge's servers when the gateway is
    silent}``.
    ``state`` is one of: ``down``; ``ready``; ``starting``; ``degraded`` (something is not there, warm requests may
    pass); ``remote`` (it runs on another machine, whose processes cannot be seen from here).
    """
    layout = Layout.of(state)
    record, note = _record(layout)
    if record is None:
        return {"state": "down", "url": None, "site": None, "host": None, "parts": {}, **_silent(None), "routes": []}
    here = on_this_host(record)
    parts = _parts(layout, record) if here else {}
    head = {"note": note, "url": record.url or None, "site": record.site, "host": record.host, "parts": parts}
    if here and all(part["state"] in ("down", "dead") for part in parts.values()):
        return {"state": "down", **head, **_silent(None), "routes": []}
    try:
        gateway = ask(layout)
    except GatewayError as error:
        state_word = _without_gateway(parts, here)
        return {"state": state_word, **head, **_silent(error.message), "routes": _routes(layout)}
    whole = all(part["state"] == "running" for part in parts.values())
    state_word = "ready" if gateway.get("state") == "ready" and whole else "starting" if whole else "degraded"
    if not here:
        state_word = "remote"
    return {"state": state_word, **head, "gateway": gateway, "gateway_error": None, "routes": []}


def _record(layout: Layout) -> tuple[ServiceRecord | None, str | None]:
    """The record, and what is wrong with it; one that cannot be understood is rebuilt from what lives."""
    if not layout.state.is_dir():
        return None, None
    try:
        return read_record(layout), None
    except RecordGarbled as error:
        return ServiceRecord(supervisor=next(iter(supervisors_of(layout)), None)), error.message


def _silent(error: str | None) -> dict[str, Any]:
    return {"gateway": None, "gateway_error": error}


def _without_gateway(parts: Mapping[str, Mapping[str, Any]], here: bool) -> str:
    if not here:
        return "remote"
    restarted = any(part["restarts"] for part in parts.values())
    dead = any(part["state"] == "dead" for part in parts.values())
    return "degraded" if restarted or dead else "starting"


def _parts(layout: Layout, record: ServiceRecord) -> dict[str, dict[str, Any]]:
    status = read_status(layout)
    notes: Mapping[str, Any] = (status or {}).get("parts", {})
    supervisor = record.supervisor if alive(record.supervisor) else next(iter(supervisors_of(layout)), None)
    supervised = supervisor is not None
    parts = {"supervisor": _part("running" if supervised else "dead", supervisor or record.supervisor, {})}
    if not supervised and record.supervisor is None:
        parts["supervisor"]["state"] = "down"
    for name, living in (("edge", edges_of), ("head", heads_of)):
        known = part_mark(status, name)
        state = part_phase(status, name).value if alive(known) else "dead" if known is not None else "down"
        if not alive(known) and (found := living(layout)):  # the notes are gone, or older than it
            known, state = found[0], "running"
        if not supervised and state == "starting":
            state = "running"  # nobody is left to note that it answers
        if name == "edge" and state == "running" and not answers(layout, "/health", 1.0):
            state = "silent"
        parts[name] = _part(state, known if alive(known) else None, notes.get(name, {}))
    serve = part_phase(status, "serve").value if supervised else "unknown"
    if parts["head"]["state"] in ("dead", "down"):
        serve = "down"
    parts["serve"] = _part(serve, None, notes.get("serve", {}))
    if serve == "unknown" and answers(layout, "/ready", 1.0):
        parts["serve"]["state"] = "running"
    return {name: parts[name] for name in _PARTS}


def _part(state: str, known: Mark | None, notes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state": state,
        "pid": known.pid if known is not None else None,
        "age_s": round(age_s(known), 1) if known is not None else None,
        "restarts": notes.get("restarts", 0),
        "last_error": notes.get("last_error", ""),
    }


def _routes(layout: Layout) -> list[dict[str, Any]]:
    """The edge's open routes, asked over its socket; empty if it is silent too."""
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
