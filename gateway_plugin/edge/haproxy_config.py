"""The edge's configuration: pure text from settings. ``docs/design.md``, Security, lists what it must refuse.

Four doors share one process: the front door (callers; over TCP, and over a Unix socket for the gateway's own user),
the inner door (requests that the ingress sends back), and internally the cold door (for requests of a slot without a
usable engine) and the around door (``gateway_plugin.edge.apart``). A slot is a backend with room for several engines;
the model of a slot and the addresses of its engines change at run time over the socket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.edge.apart import around
from gateway_plugin.edge.error_pages import client_left, http_error, own_errors, refuse_script
from gateway_plugin.edge.floods import at_a_time, in_ingress, in_slot, readiness
from gateway_plugin.edge.frontends import BUFFER_BYTES, FrontSettings, front_door
from gateway_plugin.edge.inner_door import inner_door
from gateway_plugin.edge.places import Places
from gateway_plugin.edge.served import PATHS
from gateway_plugin.edge.socket_protocol import UNLIMITED
from gateway_plugin.errors import ServiceError
from gateway_plugin.passing import FOUND_MODEL
from gateway_plugin.paths import Layout
from gateway_plugin.site import Site
from gateway_plugin.tls import ENGINE_NAME

_STREAM_S = 3600
"""Idle timeout of a connection in use."""
_INGRESS_TRIES = 30
_DESK_TRIES = 12
DESK_AT_A_TIME = 200
"""Requests for status, the catalog, metrics and administration; further ones queue at the edge for 20 s."""
_HOT_BYTES = 128 * BUFFER_BYTES
"""Freed memory that the thread keeps for reuse: saves 0.02 ms a request over new buffers."""
_PATH = re.compile(r"/[A-Za-z0-9._@=+/-]+")


@dataclass(frozen=True)
class EdgeSettings:
    """Input of the configuration."""

    layout: Layout
    site: Site
    secret: str
    """Secret by which the ingress recognises the edge."""
    places: Places
    slots: int = 64
    """With ``servers_per_slot`` as in ``serve.core``'s policy."""
    servers_per_slot: int = 8
    threads: int = 1

    @property
    def certificate(self) -> Path | None:
        """TLS certificate of the front door; ``None``: plain HTTP."""
        return None if self.site.plain_http else self.site.certificate or self.layout.front_identity


def render(settings: EdgeSettings) -> str:
    """The text of ``haproxy.cfg``. Raises ``ServiceError`` if a path cannot be written there."""
    for path in (settings.layout.state, settings.layout.run, settings.certificate):
        if path is not None and not _PATH.fullmatch(str(path)):
            raise ServiceError(f"{path}: the edge needs a path of letters, digits and . _ @ = + / - only.")
    sections = (
        _global(settings),
        _defaults(settings),
        front_door(_front(settings)),
        inner_door(settings.layout.inner_door, settings.layout.models_map, settings.places),
        _cold(settings),
        _apart(settings),
        *(_slot(settings, number) for number in range(settings.slots)),
    )
    return "\n".join(sections)


def script(settings: EdgeSettings) -> str:
    """The text of ``refuse.lua``, which the configuration loads."""
    return refuse_script(_front(settings).refusals)


def _front(settings: EdgeSettings) -> FrontSettings:
    return FrontSettings(_listen(settings), settings.layout, settings.site, settings.places)


def _global(settings: EdgeSettings) -> str:
    return f"""\
# Written by the gateway; changed by 'gateway up' only.
global
  maxconn {settings.places.connections}
  no strict-limits          # HAProxy wants two open files a connection; what is really needed: places.py
  tune.stick-counters 6
  nbthread {settings.threads}
  tune.bufsize {BUFFER_BYTES}
  tune.memory.hot-size {_HOT_BYTES} # its default holds eight buffers; each request takes two or three
  hard-stop-after 10s
  lua-load {settings.layout.edge_script}
  stats socket {settings.layout.edge_socket} mode 600 level admin
  server-state-file {settings.layout.servers_state}
  ssl-server-verify required
  ssl-default-server-options ssl-min-ver TLSv1.2
  ssl-default-bind-options ssl-min-ver TLSv1.2
"""


def _defaults(settings: EdgeSettings) -> str:
    errors = "\n".join(http_error(error) for error in own_errors())
    return f"""\
defaults
  mode http
  backlog 16384             # a caller need not retry its connection after a second while all places are taken
  option disable-h2-upgrade # an HTTP/2 body needs no length: no rule about bodies would see it
  timeout connect 20s       # with the TLS handshake: an engine too busy for it for a while is not dead
  timeout client {_STREAM_S}s
  timeout server {max(_STREAM_S, round(settings.site.limits.wait_s) + 600)}s
  timeout tunnel {_STREAM_S}s
  timeout http-request 5s   # a connection's first request, whole head, or it is closed
  timeout http-keep-alive 75s
  timeout check 10s
  retries 6
  option redispatch 1
  retry-on conn-failure empty-response
  option abortonclose
  option http-no-delay      # without it the first token of a stream waits up to 200 ms
  option contstats          # count a stream's bytes while it runs: an engine that sends some does not hang
  option dontlognull
  option srvtcpka           # a node that lost power closes nothing: end its streams within 30 s
  srvtcpka-idle 15s
  srvtcpka-intvl 5s
  srvtcpka-cnt 3
  http-reuse always
  load-server-state-from-file global
{errors}
"""


def _listen(settings: EdgeSettings) -> str:
    host = {"localhost": "127.0.0.1"}.get(settings.site.bind, settings.site.bind)
    address = f"[{host}]:{settings.site.port}" if ":" in host else f"{host}:{settings.site.port}"
    # HTTP/1.1 only, also for a client that starts with HTTP/2's preface unasked: see 'disable-h2-upgrade'.
    tls = f" ssl crt {settings.certificate} alpn http/1.1" if settings.certificate else ""
    return f"{address}{tls} maxconn {settings.places.callers} proto h1"


def _cold(settings: EdgeSettings) -> str:
    """The backends of the ingress and of the desk.

    While an ingress is replaced, no process listens on its socket: requests without any byte of an answer are retried
    once a second.
    """
    return f"""\
frontend cold_door
  bind unix@{settings.layout.cold_door} mode 600 maxconn {settings.places.inside} proto h1
  default_backend ingress

backend ingress
{client_left()}
{in_ingress(PATHS, settings.places)}\
  retries {_INGRESS_TRIES}
  # For the usage log, where the edge could not find the model: large bodies, forms.
  http-response set-var(txn.model) res.fhdr({FOUND_MODEL}) if !{{ var(txn.model) -m found }}
  http-response del-header {FOUND_MODEL}
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-edge {settings.secret}
  server ingress unix@{settings.layout.ingress_socket}

backend desk
{client_left()}
  retries {_DESK_TRIES}
  # Whatever users ask, an administrator is next in the queue.
  http-request set-priority-class int(-1) if {{ path_beg /gateway/ /metrics }}
{_to_desk(settings)}
backend ready
{readiness()}\
{_to_desk(settings)}"""


def _to_desk(settings: EdgeSettings) -> str:
    return f"""\
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-edge {settings.secret}
  server desk unix@{settings.layout.desk_socket} maxconn {DESK_AT_A_TIME}
"""


def _verified(settings: EdgeSettings, name: str) -> str:
    """Mutual TLS with a server whose certificate names ``name``."""
    ours = f"ca-file {settings.layout.ca} crt {settings.layout.edge_identity}"
    return f"  default-server ssl {ours} verify required verifyhost {name}"


def _apart(settings: EdgeSettings) -> str:
    counted = at_a_time(settings.places)
    door = f"unix@{settings.layout.around_door} mode 600 maxconn {settings.places.inside} proto h1"
    return around(
        settings.layout.around_door,
        door,
        settings.layout.models_map,
        settings.layout.ingress_socket,
        settings.secret,
        counted,
    )


def _slot(settings: EdgeSettings, number: int) -> str:
    """One backend. A refused connection marks a server down at once; a silent engine after half a minute.

    ``inter`` also bounds a check's connection and handshake: a short one marks a merely busy engine down. The servers
    have a name, never resolved, because HAProxy restores an address from its state file (``last``) only for a server
    with a name; for others it restores the port alone, and would check that port at the address written here.
    """
    key = f"str(slot{number}),map_str({settings.layout.slot_keys_map})"
    return f"""\
backend slot{number}
{client_left()}
{in_slot(number, settings.places, settings.site.limits, key)}\
  balance leastconn
  http-request set-header authorization "Bearer %[{key}]"
  # An engine's headers must control neither the ingress nor headers of the edge.
  http-response del-header x-gateway- -m beg if !{{ srv_name cold }}
  option httpchk GET /health
  http-check expect status 200
  default-server check inter 10s fastinter 1s downinter 2s fall 3 rise 1 observe layer4 error-limit 1 on-error mark-down
{_verified(settings, ENGINE_NAME)}
  server-template e 0-{settings.servers_per_slot - 1} {ENGINE_NAME}:1 init-addr last,127.0.0.1 disabled
  server cold unix@{settings.layout.cold_door} backup no-check no-ssl pool-max-conn 0 maxconn {UNLIMITED}
"""
