"""``gateway up --dry-run``: the jobs that ``up`` would have submitted. Nothing is started, made or submitted."""

from __future__ import annotations

import os
from pathlib import Path

from gateway_plugin.blocks.rehearsal import RehearsedJob, rehearsed_jobs
from gateway_plugin.catalog import load_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout
from gateway_plugin.service.ray_head import head_address
from gateway_plugin.service_state import record_here, site_with_port
from gateway_plugin.site import Site


def rehearse(
    state: Path, site_reference: str | None, models: Path | None, *, port: int | None = None
) -> tuple[tuple[RehearsedJob, ...], str]:
    """The job of each node type, as ``up`` with the same arguments would have it, and what of it is not known here.

    Raises:
        ConfigError: site, catalog (if one is given) or environment are wrong.
    """
    layout = Layout.of(state)
    known = record_here(layout) if layout.state.is_dir() else None
    if models is not None:
        load_catalog(models)
    site = site_with_port(site_reference or (known.site_reference if known is not None else "local"), port)
    site.demand_environment(os.environ)
    address, note = _address(site)
    return rehearsed_jobs(site, layout, f"{address}:{site.ray_port}"), note


def _address(site: Site) -> tuple[str, str]:
    """The head's, and a note if this is not the machine that has it: a site may be looked at from anywhere."""
    try:
        return head_address(site), ""
    except ConfigError as error:
        if not site.head_interface:
            raise
        return f"ADDRESS-OF-{site.head_interface}", f"{error.message}; printed as ADDRESS-OF-{site.head_interface}"
