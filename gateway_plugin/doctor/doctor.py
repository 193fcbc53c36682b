"""``gateway doctor``: all checks of ``up``, the site's scheduler, and the running parts; each with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway_plugin.catalog import Catalog
from gateway_plugin.doctor.scheduler import every_site_check
from gateway_plugin.errors import ConfigError, GatewayError
from gateway_plugin.paths import Layout
from gateway_plugin.service.active_catalog import own_catalog
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.service.deployment import with_port
from gateway_plugin.service.preflight import edge_binary, every_check, failures, open_files, python_version
from gateway_plugin.service.status import report
from gateway_plugin.service.up_down import ports_held
from gateway_plugin.service_state import on_this_host, read_record
from gateway_plugin.site import Site, load_site
from gateway_plugin.sizing.catalog_file import read_catalog

Checks = tuple[Check, ...]
Trial = Callable[[Layout, Site, Catalog], Checks]


def examine(
    state: Path, site_reference: str | None, models: Path | None, trial: Trial | None = None
) -> tuple[Check, ...]:
    """All checks. Without ``site_reference`` and ``models``, those of the gateway in ``state`` are used, else the
    defaults of ``up``.

    ``trial``: checks of the site's nodes by jobs, run if no failed check rules a job out.
    """
    layout = Layout.of(state)
    checks: list[Check] = []
    try:
        record = read_record(layout)
    except GatewayError as error:
        record = None
        checks.append(Check("service.json", Verdict.FAIL, error.message, "'gateway down', then remove it"))
    site, problem = _site(site_reference or (record and record.site_reference) or "local")
    checks.append(problem)
    catalog = Catalog(models=())
    named = models or (Path(record.catalog) if record and record.catalog else None)
    try:
        chosen = named or own_catalog()
        catalog = read_catalog(chosen, site)
        checks.append(Check("catalog", Verdict.OK, f"{chosen}: {len(catalog.models)} models"))
    except ConfigError as error:
        none = named is None and not Path("models.yaml").exists()
        verdict = Verdict.WARN if none else Verdict.FAIL
        advice = "'gateway up' wants one" if none else "correct the file"
        checks.append(Check("catalog", verdict, error.message, advice))
    running = _running(layout)
    if site is None:
        checks += [python_version(), edge_binary(), open_files()]
    else:
        if record is not None and record.site == site.name:
            site = with_port(site, record.port or None)
        checks += every_check(layout, site, catalog, ports_held(layout, site))
        on_site = every_site_check(layout, site)
        checks += on_site
        if trial is not None:
            checks += _tried(trial, layout, site, catalog, on_site)
    if record is not None and not on_this_host(record):
        running = Check("service", Verdict.WARN, f"runs on {record.host}", "run 'gateway doctor' there")
    return (*checks, running)


def not_elsewhere(url: str) -> Check:
    """That ``GATEWAY_URL`` names a gateway which these checks do not cover."""
    words = f"{url} is set, and these checks are of this machine and the gateway started here"
    return Check("GATEWAY_URL", Verdict.WARN, words, "for that gateway run 'gateway doctor' on its own machine")


def _tried(trial: Trial, layout: Layout, site: Site, catalog: Catalog, on_site: Checks) -> Checks:
    """The trial's checks. It is skipped if a job could not be submitted, or would pend for ever."""
    if wrong := failures(on_site):
        words = f"not submitted: {', '.join(check.name for check in wrong)} first"
        return (Check("trial jobs", Verdict.WARN, words, "fix the failed checks, then try again"),)
    try:
        return trial(layout, site, catalog)
    except GatewayError as error:
        return (Check("trial jobs", Verdict.FAIL, error.message, "correct the site file"),)


def _site(reference: str) -> tuple[Site | None, Check]:
    try:
        site = load_site(reference)
    except ConfigError as error:
        return None, Check("site", Verdict.FAIL, error.message, "correct the site file, or choose another with --site")
    kinds = ", ".join(f"{node_type.name} x {node_type.max_blocks}" for node_type in site.node_types)
    return site, Check("site", Verdict.OK, f"{site.name}: {kinds}")


def _running(layout: Layout) -> Check:
    found: dict[str, Any] = report(layout.state)
    if found["state"] == "down":
        return Check("service", Verdict.OK, "down")
    words = ", ".join(f"{name} {part['state']}" for name, part in found["parts"].items())
    if found["state"] == "ready":
        return Check("service", Verdict.OK, f"ready at {found['url']}")
    problem = found["gateway_error"] or words
    advice = "'gateway status' and 'gateway logs' show more; 'gateway up' takes over what lives"
    return Check("service", Verdict.WARN, f"{found['state']}: {problem}", advice)
