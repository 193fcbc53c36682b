"""Rules of the doors against floods: of callers, of requests, of what waits for models. Pure; see ``places.py``."""

from __future__ import annotations

from gateway_plugin.edge.error_pages import Refusal
from gateway_plugin.edge.places import Places
from gateway_plugin.errors import Unavailable

_BUSY = Refusal(
    "busy",
    Unavailable(
        "The gateway answers as many requests as it can at a time. Try again.", retry_after_s=2, state="overloaded"
    ),
)
_COLD_FULL = Refusal(
    "cold_full",
    Unavailable(
        "As many requests as the gateway can hold wait for models that are not loaded, or are answered by ones that "
        "just were. Try again later; models that are loaded answer.",
        retry_after_s=10,
        state="overloaded",
    ),
)
_MODEL_BUSY = Refusal(
    "model_busy",
    Unavailable(
        "This model answers as many requests as the gateway lets one model have at a time. Try again.",
        retry_after_s=2,
        state="overloaded",
    ),
)
_READY_BUSY = Refusal(
    "ready_busy",
    Unavailable("Too many ask for /ready at a time. Try again.", retry_after_s=1, state="overloaded"),
)
REFUSALS = (_BUSY, _COLD_FULL, _MODEL_BUSY, _READY_BUSY)
"""All that these rules may say."""
_READY_AT_A_TIME = 32
_COLD, _OTHERS, _REFUSED, _FIRST_SLOT = 2, 1, 3, 16
"""Keys of the table ``busy``; the last one, and those after it, of the slots."""
_WHOLE = "{ req.body_size le 16384 } !{ req.fhdr_cnt(transfer-encoding) gt 0 }"
"""A body so short was read whole before any rule of a backend."""


def tables() -> str:
    """What the rules count in."""
    return """\
backend busy
  stick-table type integer size 1k store conn_cur

backend sources
  stick-table type ipv6 size 20k expire 10s store conn_cur

cache ready
  total-max-size 1
  max-age 1
"""


def sources(places: Places) -> str:
    """Rules of the front door for connections, before anything is read."""
    return f"""\
  # A connection too many of one address is closed at once. This machine's own is that of all its users and tunnels.
  acl here src 127.0.0.0/8 ::1
  tcp-request connection track-sc3 src table sources if !here
  tcp-request connection reject if !here {{ sc_conn_cur(3,sources) gt {places.per_source} }}
"""


def refuse_outsiders(places: Places, *refusals: tuple[Refusal, str]) -> str:
    """Rules for who is not let in, each with its condition: strangers, and keys past their limits.

    Nothing else bounds how many of them send at a time. A caller that goes on sending reads its refusal as far as there
    are places for such; past them it is closed at once. The conditions must not cost much: they are tried twice.
    """
    crowded = f"{{ sc_conn_cur(2,busy) gt {places.refused} }}"
    rules = [f"  http-request track-sc2 int({_REFUSED}) table busy if {' or '.join(when for _, when in refusals)}"]
    for refusal, condition in refusals:
        at_once = " or ".join(f"{crowded} {term}" for term in condition.split(" or "))
        rules += [f"  {refusal.at_once()} if {at_once}", refusal.when(condition)]
    return "\n".join(rules)


UNLIMITED = 1_000_000
"""``maxconn`` of the server ``cold`` of a slot: never reached. Servers of engines have none."""


def in_slot(slot: int, places: Places) -> str:
    """Rules of a slot's backend. A request is cold where ``cold`` is all that can take it, and warm else.

    HAProxy counts the free places of usable servers, a backup's only where there is no other, and says -1 if one of
    them has no ``maxconn``. ``srv_is_up`` is no such test: it holds for an engine that drains, which takes nothing.
    """
    cold = f"{{ be_conn_free(slot{slot}) ge 0 }}"
    return f"""\
{_counted(cold, places)}\
  http-request track-sc4 int({_FIRST_SLOT + slot}) table busy if {{ fe_name front }} !{cold}
{_refuse(_MODEL_BUSY, f"{{ sc_conn_cur(4,busy) gt {places.of_one_model} }}")}
"""


def at_a_time(places: Places) -> str:
    """Rules of a backend whose requests all pass the ingress, though their model may be ready."""
    return _counted("", places)


def in_ingress(paths: str, places: Places) -> str:
    """Rules of the ingress's backend. ``paths``: what ``inference`` is."""
    # Not counted as cold so far: those whose engine died under them.
    full = f"inference {{ be_conn(ingress) gt {places.inside} }} !{{ req.fhdr_cnt(x-gateway-stamp) gt 0 }}"
    return f"""\
{paths}
{_counted("inference", places)}\
{_refuse(_COLD_FULL, full)}
"""


def _counted(cold: str, places: Places) -> str:
    """No more of callers' requests at a time than can be answered: of the cold ones, and of all others.

    Counted before they go anywhere, so that a burst is refused at its first request too many. Not counted: what comes
    by the inside doors.
    """
    caller = "{ fe_name front }"
    return f"""\
  http-request track-sc2 int({_COLD}) table busy if {caller} {cold}
{_refuse(_COLD_FULL, f"{{ sc_conn_cur(2,busy) gt {places.cold} }}")}
  http-request track-sc2 int({_OTHERS}) table busy if {caller}
{_refuse(_BUSY, f"{{ sc_conn_cur(2,busy) gt {places.busy} }}")}
"""


def _refuse(refusal: Refusal, condition: str) -> str:
    """Said by HAProxy itself where the whole body is here: the script would take several times as long."""
    return f"  {refusal.at_once()} if {condition} {_WHOLE}\n{refusal.when(condition)}"


def readiness() -> str:
    """Rules of the backend of ``/ready``, which needs no key: a "yes" is cached for a second, for all callers.

    And for the next one, while callers ask again.
    """
    yes = """return status 200 content-type application/json string '{"ready":true}'"""
    return f"""\
  http-request set-uri /ready
  # All that the caller wrote: some headers pass by a cache, and none is of use here.
  http-request del-header . -m reg
  http-request set-header host gateway
  http-request cache-use ready
  # The cache knows nothing of HTTP/1.0, keeps no answer to HEAD, and lets everybody ask at once when it is out of date.
  http-request {yes} if {{ date,sub(proc.ready_asked) eq 0 }} {{ date,sub(proc.ready_at) le 1 }}
{_READY_BUSY.when(f"{{ be_conn(ready) gt {_READY_AT_A_TIME} }}")}
  http-request set-var(proc.ready_asked) date
  http-response set-var(proc.ready_at) date if {{ status 200 }}
  http-response set-var(proc.ready_at) int(0) if !{{ status 200 }}
  http-response set-header cache-control max-age=1
  http-response cache-store ready
"""
