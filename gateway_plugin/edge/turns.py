"""Fair turns at a loaded model: who waits while its engines have as many requests as they take, and in what order. Pure
text.

Each engine has a limit (``maxconn``, set when its route is opened); a slot has one queue for what comes beyond.
HAProxy takes from the queue by time of arrival plus an offset (``set-priority-offset``), the lowest first. The offset
here is the time by which a request would be served if all that wait had equal shares::

    offset = (requests that its key and caller already have at this model) x turn

A turn is the time in which one of those who wait is served once. It is measured on every request that had to wait: what
it took from its arrival until its answer began, over what its key and caller had at the model then (Little's law: the
inverse of their rate). If turns are taken too long, those with many requests wait beyond their share, those with few
less, and the measured mean falls; if too short, it rises: it settles where all rates are equal. It needs neither the
number of those who wait nor the speed of the engines.

So the first request of a caller goes before all further ones of others, and of two that keep the engine busy each gets
half, no matter how many requests they send at a time. Offsets are bounded, and what waits ages: a request that came
``_OFFSET_MAX`` x the queue's time later goes behind. HAProxy's classes (``set-priority-class``) are not used: a lower
class waits as long as there is any request of a higher one.

A batch request counts as ``BATCH_WEIGHT``, and goes behind interactive ones that come up to ``BATCH_BEHIND_S`` later.
"""

from __future__ import annotations

from gateway_plugin.edge.error_pages import Refusal, http_error
from gateway_plugin.edge.key import BATCH
from gateway_plugin.edge.places import Places
from gateway_plugin.errors import EngineBusy, InvalidRequest
from gateway_plugin.passing import PRIORITY
from gateway_plugin.site import Limits

POSITION = "x-gateway-position"
"""Header of a 503: how many requests wait for the model."""

BATCH_WEIGHT = 8
"""A batch key gets an eighth of what an interactive one gets while both wait."""
BATCH_BEHIND_S = 30
_FIRST_NS = 2_000_000_000
"""What a request of a model is taken to last before any was measured. Too long a turn delays only who sent many
requests at once, too short a one lets them pass before others."""
_AHEAD = 1.5
"""Offsets are longer than equal shares ask for: who has less goes first for certain, in spite of rough measurements. Of
two that keep an engine busy, one with 10 requests at a time gets about 1.3 of what one with 20 gets."""
_MEAN_OVER = 2
"""A turn is a mean over the last answers, twice as many as there are requests at the model: over less than a request's
time in the queue it would follow its own effect."""
_OFFSET_MAX = 0.5
"""The largest offset, as a share of the longest time in the queue."""
_ALWAYS_IN = 8
"""Who has no more requests than these at a model waits even if its queue is full: others filled it."""
_RETRY_S = 10.0

_QUEUE_FULL = Refusal(
    "queue_full",
    EngineBusy(
        "As many requests as the gateway lets wait for this model's engines wait already, and some are this key's. Try "
        "again later.",
        retry_after_s=_RETRY_S,
        state="busy",
    ),
)
_NOT_A_PRIORITY = Refusal("priority", InvalidRequest(f"The header {PRIORITY} is 'interactive' or 'batch'."))
REFUSALS = (_QUEUE_FULL, _NOT_A_PRIORITY)
_WAITS = "{ var(txn.turns) -m found }"
_IS_BATCH = f"{{ req.fhdr({PRIORITY}) -m str batch }}"


def tables() -> str:
    """What each key and caller has in flight at each model."""
    return "backend shares\n  stick-table type string len 64 size 20k expire 10s store conn_cur\n"


def priority() -> str:
    """Rules of the front door: the request's class, in ``txn.batch``. It may be below its key's, and not above it."""
    said = f"{{ req.fhdr_cnt({PRIORITY}) gt 0 }}"
    return f"""\
{_NOT_A_PRIORITY.when(f"{said} !{{ req.fhdr({PRIORITY}) -m str interactive batch }}")}
{_NOT_A_PRIORITY.when(f"{{ req.fhdr_cnt({PRIORITY}) gt 1 }}")}
  http-request set-var(txn.batch) bool(true) if inference {{ var(txn.who) -m end {BATCH} }}
  http-request set-var(txn.batch) bool(true) if inference {said} {{ req.fhdr({PRIORITY}) -m str batch }}
"""


def queue(slot: int, limits: Limits, places: Places, warm: str, engine_key: str) -> str:
    """Rules of a slot's backend, evaluated last.

    All but the first two are for requests that have to wait: ``txn.turns`` is set for them alone. Both doors send the
    headers that name key and caller.

    Args:
        warm: condition for requests that an engine can take.
        engine_key: expression for the key of the slot's engines, which changes with the slot's model.
    """
    turn, tenant, measured = f"proc.turn{slot}", f"proc.tenant{slot}", f"proc.measured{slot}"
    another = f"{_WAITS} !{{ var(txn.same) -m int eq 0 }}"
    most_ms = round(1000 * _OFFSET_MAX * limits.queue_s)
    full = f"{{ queue(slot{slot}) ge {queued_max(limits, places)} }} {{ sc_conn_cur(5,shares) gt {_ALWAYS_IN} }}"
    answers, took = f"{_WAITS} {{ srv_id -m found }}", "{ var(txn.took) -m found }"
    return f"""\
  http-request track-sc5 req.fhdr(x-gateway-tag),concat(/{slot}/,txn.person) table shares if {warm}
  http-request set-var(txn.turns) sc_conn_cur(5,shares) if {{ var(txn.free) -m int eq 0 }}
{_QUEUE_FULL.when(f"{_WAITS} {full}")}
  http-request set-var(txn.queued) date(0,us) if {_WAITS}
  # Another model than the last one that had a queue here: all that is known of it is how many it takes at a time.
  http-request set-var(txn.tenant) {engine_key} if {_WAITS}
  http-request set-var(txn.same) var(txn.tenant),strcmp({tenant}) if {_WAITS}
  http-request set-var(txn.ahead) queue(slot{slot}) if {another}
  http-request set-var(txn.served) be_conn(slot{slot}),sub(txn.ahead) if {another}
  http-request set-var({turn}) int({_FIRST_NS}),div(txn.served) if {another}
  http-request set-var({measured}) int(0) if {another}
  http-request set-var({tenant}) var(txn.tenant) if {another}
  http-request set-var(txn.turns) var(txn.turns),mul({BATCH_WEIGHT}) if {_WAITS} {_IS_BATCH}
  http-request set-var(txn.offset) var(txn.turns),sub(1),mul({turn}),div({round(1_000_000 / _AHEAD)}) if {_WAITS}
  http-request set-var(txn.offset) var(txn.offset),add({1000 * BATCH_BEHIND_S}) if {_WAITS} {_IS_BATCH}
  http-request set-var(txn.offset) int({most_ms}) if {_WAITS} {{ var(txn.offset) -m int gt {most_ms} }}
  http-request set-priority-offset var(txn.offset) if {_WAITS}
  # Its turn came, and an engine answers (not the ingress, to which it goes when its engine's route is drained).
  http-response set-var(txn.took) date(0,us),sub(txn.queued),mul(1000),div(txn.turns) if {answers} !{{ srv_name cold }}
  http-response set-var({measured}) var({measured}),add(1) if {took}
  http-response set-var(txn.over) be_conn(slot{slot}),mul({_MEAN_OVER}) if {took}
  http-response set-var(txn.over) var({measured}) if {took} {{ var(txn.over),sub({measured}) -m int gt 0 }}
  http-response set-var({turn}) var(txn.took),sub({turn}),div(txn.over),add({turn}) if {took}
  http-response unset-var(txn.turns) if {answers}
  # What still has none was refused, or waited in vain.
  http-after-response set-header {POSITION} %[queue(slot{slot})] if {_WAITS} {{ status 503 }}
{http_error(_waited_in_vain(limits))}
  timeout queue {round(limits.queue_s)}s
"""


def queued_max(limits: Limits, places: Places) -> int:
    """Requests that may wait for one model: if its engine's route is drained, all of them go to the ingress."""
    return min(limits.queued_requests, places.cold)


def _waited_in_vain(limits: Limits) -> EngineBusy:
    return EngineBusy(
        f"This model's engines have as many requests as they take, and this one waited {limits.queue_s:.0f} s for its "
        "turn, the longest that it may. Try again later.",
        retry_after_s=_RETRY_S,
        state="busy",
    )
