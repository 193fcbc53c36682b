"""Limits of the doors: for connections, requests, and requests that wait for models. Pure; see ``places.py``."""

from __future__ import annotations

from gateway_plugin.edge import turns
from gateway_plugin.edge.error_pages import Refusal
from gateway_plugin.edge.places import Places
from gateway_plugin.edge.socket_protocol import UNLIMITED
from gateway_plugin.errors import Unavailable
from gateway_plugin.site import Limits


def _overloaded(name: str, message: str, retry_after_s: int) -> Refusal:
    return Refusal(name, Unavailable(message, retry_after_s=retry_after_s, state="overloaded"))


_BUSY = _overloaded("busy", "The gateway answers as many requests as it can at a time. Try again.", 2)
_COLD_FULL = _overloaded(
    "cold_full",
    "As many requests as the gateway can hold wait for models that are not loaded, or are answered by ones that just "
    "were. Try again later; models that are loaded answer.",
    10,
)
_MODEL_BUSY = _overloaded(
    "model_busy", "This model answers as many requests as the gateway lets one model have at a time. Try again.", 2
)
_READY_BUSY = _overloaded("ready_busy", "Too many requests for /ready at a time. Try again.", 1)
REFUSALS = (_BUSY, _COLD_FULL, _MODEL_BUSY, _READY_BUSY, *turns.REFUSALS)
"""All refusals of these rules."""
_READY_AT_A_TIME = 32
_COLD, _OTHERS, _REFUSED, _FIRST_SLOT = 2, 1, 3, 16
"""Keys of the table ``busy``; slots use the last one and those after it."""
_WHOLE = "{ req.body_size le 16384 } !{ req.fhdr_cnt(transfer-encoding) gt 0 }"
"""A body of this length has been read whole before any rule of a backend."""


def tables() -> str:
    """The tables that the rules count in."""
    return f"""\
backend busy
  stick-table type integer size 1k store conn_cur

backend sources
  stick-table type ipv6 size 20k expire 10s store conn_cur

{turns.tables()}
cache ready
  total-max-size 1
  max-age 1
"""


def sources(places: Places) -> str:
    """Rules of the front door for connections, before any byte is read."""
    return f"""\
  # A connection over the limit of one address is closed at once. Users and tunnels of this machine share its own.
  acl here src 127.0.0.0/8 ::1
  tcp-request connection track-sc3 src table sources if !here
  tcp-request connection reject if !here {{ sc_conn_cur(3,sources) gt {places.per_source} }}
"""


def refuse_outsiders(places: Places, *refusals: tuple[Refusal, str]) -> str:
    """Rules for requests not admitted, each with its condition: no valid key, or a key over its limits.

    They are also the only limit on how many such callers send at a time. A caller that is still sending can read its
    refusal while there are free places for refused senders; beyond them the connection is closed at once. Conditions
    must be cheap: each is evaluated twice.
    """
    crowded = f"{{ sc_conn_cur(2,busy) gt {places.refused} }}"
    rules = [f"  http-request track-sc2 int({_REFUSED}) table busy if {' or '.join(when for _, when in refusals)}"]
    for refusal, condition in refusals:
        at_once = " or ".join(f"{crowded} {term}" for term in condition.split(" or "))
        rules += [f"  {refusal.at_once()} if {at_once}", refusal.when(condition)]
    return "\n".join(rules)


_COLD_FREE = UNLIMITED // 2
"""More than all engines of a slot take together (``catalog.CONCURRENCY_MAX`` each)."""


def in_slot(slot: int, places: Places, limits: Limits, engine_key: str) -> str:
    """Rules of a slot's backend. A request is cold if only the server ``cold`` can take it, else warm.

    HAProxy counts the free places of usable servers (of a backup only where there is no other), and returns -1 if one
    of them has no limit. ``srv_is_up`` does not serve: it is true for a draining engine, which takes no request.
    """
    cold = f"{{ var(txn.free) -m int ge {_COLD_FREE} }}"
    return f"""\
  http-request set-var(txn.free) be_conn_free(slot{slot})
{_counted(cold, places)}\
  http-request track-sc4 int({_FIRST_SLOT + slot}) table busy if {{ fe_name front }} !{cold}
{_refuse(_MODEL_BUSY, f"{{ sc_conn_cur(4,busy) gt {places.of_one_model} }}")}
{turns.queue(slot, limits, places, f"!{cold}", engine_key)}"""


def at_a_time(places: Places) -> str:
    """Rules of a backend whose requests all pass the ingress, even if their model is ready."""
    return _counted("", places)


def in_ingress(paths: str, places: Places) -> str:
    """Rules of the ingress's backend. ``paths``: definition of the ACL ``inference``."""
    # Not yet counted as cold: requests whose engine died while it worked on them.
    full = f"inference {{ be_conn(ingress) gt {places.inside} }} !{{ req.fhdr_cnt(x-gateway-stamp) gt 0 }}"
    return f"""\
{paths}
{_counted("inference", places)}\
{_refuse(_COLD_FULL, full)}
"""


def _counted(cold: str, places: Places) -> str:
    """Limits on callers' requests at a time: cold ones, and all others.

    Counted before they are routed, so that a burst is refused from the first request over the limit. Requests of the
    internal doors are not counted.
    """
    caller = "{ fe_name front }"
    return f"""\
  http-request track-sc2 int({_COLD}) table busy if {caller} {cold}
{_refuse(_COLD_FULL, f"{{ sc_conn_cur(2,busy) gt {places.cold} }}")}
  http-request track-sc2 int({_OTHERS}) table busy if {caller}
{_refuse(_BUSY, f"{{ sc_conn_cur(2,busy) gt {places.busy} }}")}
"""


def _refuse(refusal: Refusal, condition: str) -> str:
    """Refused by HAProxy itself where the whole body is here: the script would take several times as long."""
    return f"  {refusal.at_once()} if {condition} {_WHOLE}\n{refusal.when(condition)}"


def readiness() -> str:
    """Rules of the backend of ``/ready``, which needs no key: a positive answer is cached for one second, for all
    callers, and for one more second while callers keep asking.
    """
    yes = """return status 200 content-type application/json string '{"ready":true}'"""
    return f"""\
  http-request set-uri /ready
  # Remove all of the caller's headers: some bypass a cache, and none is needed here.
  http-request del-header . -m reg
  http-request set-header host gateway
  http-request cache-use ready
  # The cache ignores HTTP/1.0, stores no answer to HEAD, and lets all requests through at once when it expires.
  http-request {yes} if {{ date,sub(proc.ready_asked) eq 0 }} {{ date,sub(proc.ready_at) le 1 }}
{_READY_BUSY.when(f"{{ be_conn(ready) gt {_READY_AT_A_TIME} }}")}
  http-request set-var(proc.ready_asked) date
  http-response set-var(proc.ready_at) date if {{ status 200 }}
  http-response set-var(proc.ready_at) int(0) if !{{ status 200 }}
  http-response set-header cache-control max-age=1
  http-response cache-store ready
"""
