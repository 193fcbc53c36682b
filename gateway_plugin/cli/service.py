"""``gateway up``, ``down``, ``status``, ``doctor``, ``logs``."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import click

from gateway_plugin.cli.connection import demand_at_hand, elsewhere, mind_elsewhere
from gateway_plugin.cli.output import (
    Steps,
    duration,
    json_option,
    make_table,
    put,
    put_json,
    put_parts,
    settings,
    show,
    table,
    text,
)
from gateway_plugin.masking import masked
from gateway_plugin.paths import Layout

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--site", help="Name in parsl_configs (local), package.module, or a .py file. Default: as before, or local."
)
@click.option("--models", type=_FILE, help="Catalog. Default: as before, or models.yaml.")
@click.option("--port", type=click.IntRange(1024, 65535), help="Port of the front door instead of the site's.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds to wait until it serves.")
@click.option("--dry-run", is_flag=True, help="Print the job script of every node type; start and submit nothing.")
@json_option
def up(site: str | None, models: Path | None, port: int | None, timeout: float, dry_run: bool) -> None:
    """Start the gateway and wait until it serves.

    Running again is safe: what is up stays, what survived a crash is taken over.
    """
    from gateway_plugin.service import up_down as lifecycle
    from gateway_plugin.service.dry_run import rehearse

    chosen = settings()
    if dry_run:
        jobs, note = rehearse(chosen.state, site, models, port=port)
        if note:
            put(note, err=True)
        scripts = [{"node_type": j.node_type, "block": j.block, "command": j.command, "script": j.text} for j in jobs]
        show(scripts, lambda: put("\n".join(_rehearsed(job.node_type, job.command, job.text) for job in jobs)))
        return
    interrupt_on_signals()
    try:
        with Steps("starting") as steps:
            result = lifecycle.up(
                chosen.state, site, models, port=port, timeout_s=timeout,
                report=lambda progress: steps.update(progress.parts, progress.elapsed_s),
            )  # fmt: skip
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # finished; a second Ctrl-C changes nothing
        put(f"ended what was started; logs: {Layout(chosen.state).logs}", err=True)
        raise
    words = {
        lifecycle.Outcome.STARTED: f"up at {result.url} after {result.seconds:.1f} s",
        lifecycle.Outcome.ADOPTED: f"up again at {result.url} after {result.seconds:.1f} s; what lived was taken over",
        lifecycle.Outcome.ALREADY_UP: f"already up at {result.url}",
    }[result.outcome]
    document = {"outcome": result.outcome.value, "url": result.url, "seconds": round(result.seconds, 2)}
    if result.note:
        put(result.note, err=True)
    mind_elsewhere()
    show(document, lambda: put(words))


def interrupt_on_signals() -> None:
    """Make a closed terminal or a time limit clean up as Ctrl-C does; under ``nohup`` a closed terminal is ignored."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _rehearsed(node_type: str, command: str, text: str) -> str:
    return f"# ---- node type {node_type}: {command or 'run on this machine'}\n{text}"


def _number(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    """``FloatRange`` lets ``nan`` pass, which is in no range."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number of seconds.")
    return value


@click.command()
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    callback=_number,
    help="Seconds for requests in flight; 0: none, inf: as long as they take.",
)
@click.option("--force", is_flag=True, help="Kill without asking; what is in flight is lost.")
@click.option("--timeout", default=90.0, show_default=True, help="Seconds that an orderly end may take after that.")
@json_option
def down(grace: float, force: bool, timeout: float) -> None:
    """End everything that belongs to the gateway; nothing is left.

    New requests are refused at once, those in flight may end within --grace. Ctrl-C twice ends them at once.
    """
    from gateway_plugin.service import up_down as lifecycle
    from gateway_plugin.service.startup import Progress

    patience = _Patience()
    with Steps("ending") as steps, patience:

        def report(progress: Progress) -> None:
            drain = progress.drain
            patience.draining = drain is not None and not drain.done
            if drain is not None and settings().json:
                put_json({"draining": {"in_flight": drain.in_flight, "left_s": drain.left_s}}, err=True)
            steps.update(patience.said(progress.parts), progress.elapsed_s)

        result = lifecycle.down(
            settings().state, grace_s=grace, forced=force, timeout_s=timeout, hurry=patience.hurry, report=report
        )
    nothing = result.outcome is lifecycle.Outcome.NOTHING_RAN
    words = (
        f"nothing ran from {settings().state}"
        if nothing
        else f"down after {result.seconds:.1f} s; no process and no socket is left"
    )
    first, cut = (result.drain.first, result.drain.cut) if result.drain is not None else (0, 0)
    if first:
        words += f"; of {first} requests in flight {first - cut} ended by themselves, {cut} were cut"
    document = {"outcome": result.outcome.value, "seconds": round(result.seconds, 2), "in_flight": first, "cut": cut}
    if result.note:
        put(result.note, err=True)
    mind_elsewhere()
    show(document, lambda: put(words))


class _Patience:
    """Ctrl-C while requests in flight are waited for: the first one prints the effect of a second one."""

    def __init__(self) -> None:
        self.draining = True  # from the start: Ctrl-C may come before the first progress
        self.hurry = threading.Event()
        self._pressed = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def said(self, rows: Sequence[tuple[str, str, str]]) -> Sequence[tuple[str, str, str]]:
        """The rows of the display, with the effect of another Ctrl-C after the first."""
        if not self.draining or not self._pressed:
            return rows
        return [(what, phase, f"{note}; Ctrl-C once more cuts them") for what, phase, note in rows]

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.hurry.is_set() or not (self.draining or self._pressed):
            raise KeyboardInterrupt
        if self._pressed:
            self.hurry.set()
        self._pressed = True


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@json_option
def status(watch: bool) -> None:
    """Show what runs. Exit code 3 if the gateway is not ready.

    Of a gateway elsewhere (GATEWAY_URL): the part of its status that your key may see.
    """
    from gateway_plugin.connection import find_gateway
    from gateway_plugin.service.status import report, report_elsewhere

    state = settings().state
    connection = find_gateway() if elsewhere() is not None else None

    def look() -> dict[str, Any]:
        return report(state) if connection is None else report_elsewhere(connection)

    found = look()
    if watch and not settings().json:
        from rich.console import Group
        from rich.live import Live

        with Live(refresh_per_second=4, screen=True) as live:
            while True:
                live.update(Group(*_status_parts(found)))
                time.sleep(1.0)
                found = look()
    while watch:
        show(found, lambda: None)
        time.sleep(1.0)
        found = look()
    show(found, lambda: put_parts(_status_parts(found)))
    if found["state"] not in ("ready", "remote"):
        raise click.exceptions.Exit(3)


def _status_parts(found: dict[str, Any]) -> list[Any]:
    place = f" (site {found['site']} on {found['host']})" if found.get("site") else ""
    where = f" at {found['url']}{place}" if found["url"] else ""
    if drain := found.get("drain"):
        where += f"; {drain['in_flight']} requests in flight have {drain['left_s']:.0f} s left"
    parts: list[Any] = [text(f"gateway: {found['state']}{where}")]
    if found.get("note"):
        parts.append(text(found["note"]))
    if found["state"] == "down":
        parts.append(text("'gateway up' starts it; one elsewhere is asked with GATEWAY_URL and GATEWAY_API_KEY"))
    if found["parts"]:
        rows = [
            (name, part["state"], part["pid"], duration(part["age_s"]), part["restarts"], part["last_error"])
            for name, part in found["parts"].items()
        ]
        parts.append(make_table(("part", "state", "pid", "age", "restarts", "last error"), rows))
    gateway = found["gateway"]
    if gateway is None:
        if found["gateway_error"]:
            parts.append(text(f"status over HTTP: {found['gateway_error']}"))
        if found["routes"]:
            routes = [(r["model"], r["state"], r["in_flight"], r["server"], r["address"]) for r in found["routes"]]
            parts.append(make_table(("model", "route", "in flight", "server", "address"), routes, "routes of the edge"))
        return parts
    models = [
        (m["id"], m["state"], "yes" if m.get("pinned") else "", m.get("in_flight"), m.get("waiting"),
         duration(m.get("eta_s")), m.get("reason"))
        for m in gateway.get("models", ())
    ]  # fmt: skip
    parts.append(make_table(("model", "state", "pinned", "in flight", "waiting", "ready in", "reason"), models))
    engines = [
        (e["id"], e["model"], e["node"], e["state"], e.get("route"), e.get("in_flight"), duration(e.get("age_s")))
        for e in gateway.get("engines", ())
    ]
    if engines:
        parts.append(make_table(("engine", "model", "node", "state", "route", "in flight", "age"), engines))
    nodes = [
        (n["id"], n.get("type"), n.get("phase"), n.get("block"), f"{n.get('free_mib')} of {n.get('host_mib')} MiB",
         duration(n.get("age_s")))
        for n in gateway.get("nodes", ())
    ]  # fmt: skip
    if nodes:
        parts.append(make_table(("node", "type", "phase", "block", "free", "age"), nodes))
    types = [
        (t["type"], t["running"], t["pending"], t["max"], t.get("reason"), duration(t.get("starts_in_s")))
        for t in gateway.get("types", ())
    ]
    if types:
        parts.append(make_table(("blocks of type", "running", "pending", "max", "waits for", "starts in"), types))
    for kind in gateway.get("types", ()):
        if kind.get("trouble"):
            words = (
                f"trouble: {kind['trouble']}. Tried again in {duration(kind['retry_in_s'])}; at once with "
                f"'gateway blocks retry {kind['type']}'."
            )
            parts.append(text(words))
    if gateway.get("storage"):
        unwritten = ", ".join(gateway.get("unwritten", ()))
        parts.append(text(f"{gateway['storage']}. What is in force goes on; not on disk yet: {unwritten}"))
    parts.append(text(f"waiting requests: {gateway.get('waiting', 0)}   switches: {gateway.get('switches', 0)}"))
    return parts


@click.command()
@click.option("--site", help="Site to check. Default: the one that runs, or local.")
@click.option("--models", type=_FILE, help="Catalog to check. Default: the one that runs.")
@click.option("--submit", is_flag=True, help="Submit a short job of each node type that looks at its node.")
@click.option("--wait", default=600.0, show_default=True, help="Seconds that those jobs may wait in their queue.")
@json_option
def doctor(site: str | None, models: Path | None, submit: bool, wait: float) -> None:
    """Check everything that a start needs, the site's scheduler too. Exit code 1 if something forbids it.

    With --submit, jobs check the nodes; they are always cleaned up, Ctrl-C cancels them.
    """
    from gateway_plugin.doctor.doctor import examine, not_elsewhere
    from gateway_plugin.service.preflight import failures

    url = elsewhere()
    if submit:
        from gateway_plugin.doctor.node_probe import try_nodes

        interrupt_on_signals()
        with Steps("node type") as steps:
            checks = examine(
                settings().state,
                site,
                models,
                lambda layout, site, catalog: try_nodes(layout, site, wait, steps.update, catalog),
            )
    else:
        checks = examine(settings().state, site, models)
    if url is not None:
        checks = (not_elsewhere(url), *checks)
    document = [
        {"name": c.name, "verdict": c.verdict.value, "found": c.found, "advice": c.advice or None} for c in checks
    ]
    rows = [(c.verdict.value, c.name, c.found, c.advice) for c in checks]
    show(document, lambda: table(("", "check", "found", "what to do"), rows))
    if failures(checks):
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("what", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added.")
@click.option("-n", "--lines", default=50, show_default=True, type=click.IntRange(0), help="Lines from the end.")
@json_option
def logs(what: str | None, follow: bool, lines: int) -> None:
    """Show a log: controller, ingress, edge, usage, supervisor, ray, engine:NAME, block:NAME ...

    Without WHAT, list the logs. A prefix of a NAME is enough: the newest match is shown.
    """
    from gateway_plugin.service import logs as log_files

    demand_at_hand("The logs")
    layout = Layout.of(settings().state)
    if what is None:
        found = log_files.find_logs(layout)
        document = [{"name": name, "path": str(path), "bytes": path.stat().st_size} for name, path in found.items()]
        rows = [(d["name"], d["bytes"], d["path"]) for d in document]
        none = f"no logs in {layout.logs}: nothing was started from there yet"
        show(document, lambda: table(("log", "bytes", "path"), rows) if rows else put(none, err=True))
        return
    path = log_files.log_named(layout, what)
    secrets = log_files.secrets_in_force(layout)
    last = [masked(line, secrets) for line in log_files.last_lines(path, lines)]
    if settings().json and not follow:
        show({"name": what, "path": str(path), "lines": last}, lambda: None)
        return
    for line in itertools.chain(last, log_files.follow(path) if follow else ()):
        put(masked(line, secrets))
