"""The edge's configuration: pure text from settings. What it must refuse is in ``docs/design.md``, Security.

Four doors share one process: the front door (callers; over TCP, and over a Unix socket for the gateway's own user),
the inner door (requests that the ingress sends back), and inside the cold door (where a slot without a usable engine
hands its requests on) and the around door (``gateway_plugin.edge.apart``). A slot is a backend with room for several
engines; which model is in which slot, and where its engines are, changes at run time over the socket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from gateway_plugin.edge.apart import around
from gateway_plugin.edge.error_pages import client_left, http_error, own_errors, refuse_script
from gateway_plugin.edge.floods import UNLIMITED, at_a_time, in_ingress, in_slot, readiness
from gateway_plugin.edge.frontends import BUFFER_BYTES, PATHS, FrontSettings, front_door, inner_door
from gateway_plugin.edge.places import Places
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.site import Site
from gateway_plugin.tls import ENGINE_NAME, SERVE_NAME

_STREAM_S = 3600
"""Longest silence on a connection in use."""
_INGRESS_TRIES = 30
_HOT_BYTES = 128 * BUFFER_BYTES
"""Of freed memory that the thread keeps at hand: 0.02 ms less for each request than fetching buffers anew."""
_PATH = re.compile(r"/[A-Za-z0-9._@=+/-]+")


@dataclass(frozen=True)
class EdgeSettings:
    """Everything that the configuration depends on."""

    bind: str
    port: int
    certificate: Path | None
    serve_port: int
    secret: str
    """What the edge shows to the ingress."""
    body_bytes: int
    in_flight_per_key: int
    requests_per_key_10s: int
    wait_s: float
    """Longest wait of a request at the ingress; the edge waits longer."""
    places: Places
    slots: int
    servers_per_slot: int
    threads: int
    cors_origins: tuple[str, ...]
    script: Path
    socket: Path
    owner_door: Path
    inner_door: Path
    cold_door: Path
    ingress_socket: Path
    around_door: Path
    keys_map: Path
    models_map: Path
    slot_keys_map: Path
    servers_state: Path
    ca: Path
    identity: Path

    @classmethod
    def of(
        cls,
        layout: Layout,
        site: Site,
        secret: str,
        places: Places,
        slots: int = 64,
        servers_per_slot: int = 8,
        threads: int = 1,
    ) -> EdgeSettings:
        """Settings of ``site``; the number of slots and servers is that of ``serve.core.policy.Policy``."""
        return cls(
            bind=site.bind,
            port=site.port,
            certificate=None if site.plain_http else site.certificate or layout.front_identity,
            serve_port=site.serve_port,
            secret=secret,
            body_bytes=site.limits.body_bytes,
            in_flight_per_key=site.limits.in_flight_per_key,
            requests_per_key_10s=site.limits.requests_per_key_10s,
            wait_s=site.limits.wait_s,
            places=places,
            slots=slots,
            servers_per_slot=servers_per_slot,
            threads=threads,
            cors_origins=site.cors_origins,
            script=layout.edge_script,
            socket=layout.edge_socket,
            owner_door=layout.owner_door,
            inner_door=layout.inner_door,
            cold_door=layout.cold_door,
            ingress_socket=layout.ingress_socket,
            around_door=layout.around_door,
            keys_map=layout.keys_map,
            models_map=layout.models_map,
            slot_keys_map=layout.slot_keys_map,
            servers_state=layout.servers_state,
            ca=layout.ca,
            identity=layout.edge_identity,
        )


def render(settings: EdgeSettings) -> str:
    """The text of ``haproxy.cfg``. Raises ``ServiceError`` if a path cannot be written there."""
    for path in (getattr(settings, field.name) for field in fields(settings)):
        if isinstance(path, Path) and not _PATH.fullmatch(str(path)):
            raise ServiceError(f"{path}: the edge needs a path of letters, digits and . _ @ = + / - only.")
    sections = (
        _global(settings),
        _defaults(settings),
        front_door(_front(settings)),
        inner_door(settings.inner_door, settings.models_map, settings.places),
        _cold(settings),
        _apart(settings),
        *(_slot(settings, number) for number in range(settings.slots)),
    )
    return "\n".join(sections)


def script(settings: EdgeSettings) -> str:
    """The text of ``refuse.lua``, which the configuration loads."""
    return refuse_script(_front(settings).refusals)


def _front(settings: EdgeSettings) -> FrontSettings:
    return FrontSettings(
        listen=_listen(settings),
        owner_door=settings.owner_door,
        keys_map=settings.keys_map,
        models_map=settings.models_map,
        body_bytes=settings.body_bytes,
        in_flight_per_key=settings.places.of_one_key(settings.in_flight_per_key),
        requests_per_key_10s=settings.requests_per_key_10s,
        cors_origins=settings.cors_origins,
        places=settings.places,
    )


def _global(settings: EdgeSettings) -> str:
    return f"""\
# Written by the gateway; changed by 'gateway up' only.
global
  maxconn {settings.places.connections}
  no strict-limits          # HAProxy wants two open files a connection; what is really needed: places.py
  tune.stick-counters 5
  nbthread {settings.threads}
  tune.bufsize {BUFFER_BYTES}
  tune.memory.hot-size {_HOT_BYTES} # its default holds eight buffers; each request takes two or three
  hard-stop-after 10s
  lua-load {settings.script}
  stats socket {settings.socket} mode 600 level admin
  server-state-file {settings.servers_state}
  ssl-server-verify required
  ssl-default-server-options ssl-min-ver TLSv1.2
  ssl-default-bind-options ssl-min-ver TLSv1.2
"""


def _defaults(settings: EdgeSettings) -> str:
    errors = "\n".join(http_error(error) for error in own_errors())
    return f"""\
defaults
  mode http
  backlog 16384             # who comes while all places are taken is not to knock again a second later
  option disable-h2-upgrade # a body of HTTP/2 need not say its length: no rule about bodies would see it
  timeout connect 20s       # with the TLS handshake: an engine too busy to shake hands for a while is not a dead one
  timeout client {_STREAM_S}s
  timeout server {max(_STREAM_S, round(settings.wait_s) + 600)}s
  timeout tunnel {_STREAM_S}s
  timeout http-request 5s   # a connection's first request, whole head, or it is closed
  timeout http-keep-alive 75s
  timeout check 10s
  retries 6
  option redispatch 1
  retry-on conn-failure empty-response
  option abortonclose
  option http-no-delay      # without it the first token of a stream waits up to 200 ms
  option contstats          # bytes of a stream are counted while it runs: an engine that sends some does not hang
  option dontlognull
  option srvtcpka           # a node that lost its power closes nothing: what it was sending breaks off within 30 s
  srvtcpka-idle 15s
  srvtcpka-intvl 5s
  srvtcpka-cnt 3
  http-reuse always
  load-server-state-from-file global
{errors}
"""


def _listen(settings: EdgeSettings) -> str:
    host = {"localhost": "127.0.0.1"}.get(settings.bind, settings.bind)
    address = f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"
    # HTTP/1.1 only, also for who begins with HTTP/2's preface unasked: see 'disable-h2-upgrade'.
    tls = f" ssl crt {settings.certificate} alpn http/1.1" if settings.certificate else ""
    return f"{address}{tls} maxconn {settings.places.callers} proto h1"


def _cold(settings: EdgeSettings) -> str:
    """The ways to the ingress and to the desk.

    While an ingress is replaced nobody listens on its socket: requests that it has not answered with a byte try again
    once a second. What Serve's proxy says by itself is plain text: the edge says it in JSON.
    """
    return f"""\
frontend cold_door
  bind unix@{settings.cold_door} mode 600 maxconn {settings.places.inside} proto h1
  default_backend ingress

backend ingress
{client_left()}
{in_ingress(PATHS, settings.places)}\
  retries {_INGRESS_TRIES}
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-edge {settings.secret}
  server ingress unix@{settings.ingress_socket}

backend desk
{client_left()}
{_to_desk(settings)}
backend ready
{readiness()}\
{_to_desk(settings)}"""


def _to_desk(settings: EdgeSettings) -> str:
    plain = "!{ res.hdr(content-type) -m sub json }"
    return f"""\
  # Both sides are verified: on a shared node anybody may bind a port that is free for a moment, or ask there.
  http-request del-header authorization
  http-request del-header x-api-key
  http-request set-header x-gateway-edge {settings.secret}
  http-response return status 503 default-errorfiles if {{ status ge 400 }} {plain}
  default-server ssl ca-file {settings.ca} crt {settings.identity} verify required verifyhost {SERVE_NAME}
  server desk 127.0.0.1:{settings.serve_port}
"""


def _apart(settings: EdgeSettings) -> str:
    counted = at_a_time(settings.places)
    door = f"unix@{settings.around_door} mode 600 maxconn {settings.places.inside} proto h1"
    return around(settings.around_door, door, settings.models_map, settings.ingress_socket, settings.secret, counted)


def _slot(settings: EdgeSettings, number: int) -> str:
    """One backend. A refused connection marks a server down at once; an engine that is silent is given half a minute.

    ``inter`` also bounds a check's connection and handshake: a short one condemns an engine that is merely busy.
    The servers have a name, never looked up, because HAProxy takes an address from its state file (``last``) only for
    a server that has one; of all others it takes the port, and would look for it on the address written here.
    """
    return f"""\
backend slot{number}
{client_left()}
{in_slot(number, settings.places)}\
  balance leastconn
  http-request set-header authorization "Bearer %[str(slot{number}),map_str({settings.slot_keys_map})]"
  # What an engine says is for the caller: it controls neither the ingress nor what the edge says itself.
  http-response del-header x-gateway- -m beg if !{{ srv_name cold }}
  option httpchk GET /health
  http-check expect status 200
  default-server check inter 10s fastinter 1s downinter 2s fall 3 rise 1 observe layer4 error-limit 1 on-error mark-down
  default-server ssl ca-file {settings.ca} crt {settings.identity} verify required verifyhost {ENGINE_NAME}
  server-template e 0-{settings.servers_per_slot - 1} {ENGINE_NAME}:1 init-addr last,127.0.0.1 disabled
  server cold unix@{settings.cold_door} backup no-check no-ssl pool-max-conn 0 maxconn {UNLIMITED}
"""
