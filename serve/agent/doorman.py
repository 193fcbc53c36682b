"""A doorman: HAProxy in front of an engine that cannot demand a client certificate. Pure, but for finding the program.

It accepts on a socket that the agent has bound to the engine's address (descriptor 3: it works from inside a network
namespace, too), demands the gateway's client certificate and, but for ``GET /health``, the engine's key, and passes
requests on without the key, to a Unix socket in a private folder, or to loopback where the engine can listen nowhere
else. It is started in the engine's session by a shell that then becomes the engine: so the process that
the agent watches is the engine, and what ends its group ends the doorman. If the doorman ends, the shell's background
process ends the engine, whether an agent watches it or not.

The configuration comes through the environment and a pipe: there is no file that could be left over, and it has the
SHA-256 of the key only, so that the key is neither in a command line nor in the engine's environment.
"""

from __future__ import annotations

import hashlib
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from gateway_plugin.errors import ServiceError
from gateway_plugin.haproxy import binary
from serve.agent.engines.start import Bind, TlsFiles

_CONFIG = "GATEWAY_DOORMAN"
"""Variable with the configuration; unset before the engine starts."""
_WATCH = f"""\
ulimit -n "$(ulimit -H -n)"
printf '%s\\n' "${_CONFIG}" | $3 "$2" -db -f /dev/stdin
code=$?
exec 3<&-  # what connects now is refused at once
echo "doorman: fatal: HAProxy ended with exit code $code" >&2
kill -TERM "$1"
sleep 5
kill -KILL "$1"
"""
"""Arguments: the engine's PID, which no other process gets while its session has members; HAProxy; what runs it."""
_SCRIPT = f"""\
exec 3<&0 </dev/null
dies=
setpriv --pdeathsig KILL true 2>/dev/null && dies="setpriv --pdeathsig KILL"
$dies sh -c "$1" doorman $$ "$2" "$dies" &
unset {_CONFIG}
shift 2
exec "$@" 3<&-
"""
"""The kernel kills the doorman with the engine (util-linux 2.33 and later; else the agent does): the edge then sees its
connections break and its port refuse, as of any dead engine, and sends elsewhere what was not answered."""
_BACKLOG = 4096
_STREAM_S = 86_400
"""Idle timeout of a connection in use: longer than the edge's, which decides."""
_FILES = 40_000
"""Open files: two a connection, more than the edge sends to an engine at a time (``CONCURRENCY_MAX``)."""
_FILES_MIN = 256
"""HAProxy 2.8 does not start with fewer than some 220: those of 100 connections, and its own."""


@dataclass(frozen=True)
class Doorman:
    """One doorman."""

    inner: Bind
    """Where the engine listens."""
    tls: TlsFiles
    key: str
    """What callers must show."""
    health: str = "/health"
    """The engine's path that answers 200 once it is loaded."""
    deaf_while_busy: bool = False
    """The engine answers nothing while it works: ``/health`` is then answered here."""


def config(doorman: Doorman) -> str:
    """The text of its configuration.

    Errors of its own are not answered but the connection is closed: the edge then sees what it would see of the engine,
    and may try another one.
    """
    inner = f"unix@{doorman.inner.socket}" if doorman.inner.socket else doorman.inner.address
    files = f'crt "{doorman.tls.certificate}" ca-file "{doorman.tls.authority}"'
    secret = hashlib.sha256(f"Bearer {doorman.key}".encode()).hexdigest()
    moved = "" if doorman.health == "/health" else f"  http-request set-path {doorman.health}\n"
    busy = "  http-request return status 200 if { be_conn(engine) gt 0 }\n" if doorman.deaf_while_busy else ""
    refusal = f"status 401 content-type application/json string '{_REFUSAL}'"
    return f"""\
global
  fd-hard-limit {_FILES}     # connections: as many as that, or a lower limit of the process, allows
  nbthread 1
  hard-stop-after 1s
  ssl-load-extra-del-ext
  ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
  mode http
  backlog {_BACKLOG}
  option disable-h2-upgrade
  option http-no-delay      # without it the first token of a stream waits up to 200 ms
  option abortonclose
  option clitcpka
  timeout connect 20s
  timeout client {_STREAM_S}s
  timeout server {_STREAM_S}s
  timeout tunnel {_STREAM_S}s
  timeout http-request 20s
  timeout http-keep-alive {_STREAM_S}s
  http-reuse always
  errorfile 500 /dev/null
  errorfile 502 /dev/null
  errorfile 503 /dev/null
  errorfile 504 /dev/null

frontend door
  bind fd@3 ssl {files} verify required proto h1
  acl asks_health var(txn.asks) -m str health
  acl has_one_key req.fhdr_cnt(authorization) eq 1
  acl has_the_key req.fhdr(authorization),sha2(256),hex -m str -i {secret}
  http-request set-var(txn.asks) str(health) if METH_GET {{ path /health }}
  http-request return {refusal} if !asks_health !has_one_key
  http-request return {refusal} if !asks_health !has_the_key
  use_backend health if asks_health
  default_backend engine

backend engine
  http-request del-header authorization
  http-request del-header x-api-key
  retries 1
  retry-on conn-failure empty-response # of a connection that the engine has just closed
  server engine {inner} proto h1

backend health
  http-request del-header authorization
  http-request del-header x-api-key
{busy}{moved}\
  retries 0
  server engine {inner} proto h1
"""


_REFUSAL = '{"error":{"message":"wrong engine key","type":"authentication_error","code":401}}'


def behind(
    doorman: Doorman, argv: tuple[str, ...], env: Mapping[str, str], program: str = ""
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Command line and environment of an engine with its doorman; standard input is to be the ``listener``.

    ``program``: the HAProxy; default: this node's.

    Raises:
        ServiceError: there is no HAProxy on this node, or a process may not open as many files as it needs.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < _FILES_MIN:
        raise ServiceError(
            f"its doorman (HAProxy) needs {_FILES_MIN} open files, and a process on this node may have {hard}: raise "
            "the hard limit (ulimit -Hn), which worker_init, the batch system or limits.conf sets."
        )
    words = ("sh", "-c", _SCRIPT, "doorman", _WATCH, program or _program(), *argv)
    return words, {**env, _CONFIG: config(doorman)}


def listener(host: str) -> socket.socket:
    """A socket that accepts connections on a free port of ``host``. Raises ``OSError``."""
    made = socket.socket()
    try:
        made.bind((host, 0))
        made.listen(_BACKLOG)
    except OSError:
        made.close()
        raise
    return made


@cache
def _program() -> str:
    return str(binary())
