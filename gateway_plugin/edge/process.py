"""The edge as a process: writes its files, builds its command line, checks its configuration."""

from __future__ import annotations

import logging
import os
import re
import resource
import secrets
import socket
import subprocess

import psutil

from gateway_plugin.edge.haproxy_config import EdgeSettings, render, script
from gateway_plugin.edge.keys import KeyStore
from gateway_plugin.edge.places import places
from gateway_plugin.errors import ServiceError
from gateway_plugin.files import set_aside, text_in, write_private
from gateway_plugin.haproxy import CHOICE, binary
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.site import WILDCARDS, Site
from gateway_plugin.tls import make_authority

log = logging.getLogger(__name__)

_SECRET = re.compile(r"[\w-]{43}\n?")
_MAP = re.compile(r"([A-Za-z0-9._:@/+=-]+ [A-Za-z0-9._:@/+=-]+\n)*")
_STATE = re.compile(r"|1\n# be_id [ -~\n]*\n")


def prepare(
    layout: Layout,
    site: Site,
    *,
    slots: int = 64,
    servers_per_slot: int = 8,
    threads: int = 1,
    open_files: int | None = None,
) -> None:
    """Write all files that the edge reads. Existing maps and server states are kept: they are its routes.

    ``open_files``: its limit of open files; default: this process's hard limit.

    Raises:
        ServiceError: a folder is another user's, a path cannot be configured, or the limit of open files is too low.
    """
    layout.make()
    make_authority(layout, front_hosts=front_hosts(site))
    if site.certificate is not None and not os.access(site.certificate, os.R_OK):
        raise ServiceError(f"{site.certificate}: the front door's certificate cannot be read.")
    if not _SECRET.fullmatch(text_in(layout.edge_secret) or ""):  # an empty one would admit every request
        write_private(layout.edge_secret, secrets.token_urlsafe(32))
    mend_maps(layout)
    KeyStore(layout).write_map()
    settings = EdgeSettings(
        layout,
        site,
        secret=layout.edge_secret.read_text().strip(),
        places=places(open_files or open_files_limit(), site.limits.relayed_requests, slots, servers_per_slot),
        slots=slots,
        servers_per_slot=servers_per_slot,
        threads=threads,
    )
    write_private(layout.edge_script, script(settings))
    write_private(layout.edge_config, render(settings))


def mend_maps(layout: Layout) -> None:
    """Ensure that maps and server states can be loaded: a garbled file is set aside and replaced by an empty one.
    The controller then restores a running edge's missing routes. Raises ``OSError``."""
    for path, form in (
        (layout.models_map, _MAP),
        (layout.slot_keys_map, _MAP),
        (layout.servers_state, _STATE),
    ):
        content = text_in(path)
        if content is not None and not form.fullmatch(content):
            log.warning("%s is garbled: set aside as %s", path, set_aside(path))
            content = None
        if content is None:
            write_private(path, "")


def open_files_limit() -> int:
    """How many files a process that is started here may open: the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


def front_hosts(site: Site) -> tuple[str, ...]:
    """Names and addresses by which callers reach the front door; none if its certificate is not ours."""
    if site.plain_http or site.certificate is not None:
        return ()
    local = ("localhost", "127.0.0.1", "::1")
    if site.bind in local:
        return (*local, *site.names)  # remote callers use a tunnel, which ends on their own loopback
    here = (site.bind,) if site.bind not in WILDCARDS else _addresses()
    return (*local, *here, socket.getfqdn(), socket.gethostname(), *site.names)


def _addresses() -> tuple[str, ...]:
    """This machine's IP addresses, except link-local ones (``fe80::``, which carry the link's name)."""
    known = (address for addresses in psutil.net_if_addrs().values() for address in addresses)
    return tuple(a.address for a in known if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address)


def of_this_version(layout: Layout) -> bool:
    """Whether a running edge has the doors that this version's other parts use, judged by its configuration."""
    configured = text_in(layout.edge_config) or ""
    return all(str(door) in configured for door in (layout.owner_door, layout.ingress_socket, layout.desk_socket))


def argv(layout: Layout) -> tuple[str, ...]:
    """Argv of the edge in the foreground. Its usage log goes to standard output, its messages to standard error."""
    return (str(binary()), "-db", "-f", str(layout.edge_config))


def check(layout: Layout) -> None:
    """Have HAProxy check the configuration. Raises ``ServiceError`` with its message if it would not start."""
    private_folder(layout.run)
    program = binary()
    done = subprocess.run(
        (str(program), "-c", "-f", str(layout.edge_config)), capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "[ALERT]" in line] or [done.stderr]
        raise ServiceError(
            f"{program} refuses {layout.edge_config}: {said[0].strip()} ({CHOICE} can name another HAProxy.)"
        )
