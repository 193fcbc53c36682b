"""Web pages that call from a browser (CORS): rules for the front door. Pure text.

A page may read answers if its origin is exactly one of the site's. Credentials are never allowed: a browser adds no key
by itself, the page must have one. A preflight carries no key; its answer lists what pages may send, and nothing else
about the gateway.
"""

from __future__ import annotations

from collections.abc import Sequence

METHODS = "GET, HEAD, POST"
EXPOSED = "x-gateway-request, x-gateway-position, retry-after, x-should-retry"
_MAX_AGE_S = 600
_ASKED_FOR = r"^[A-Za-z0-9_-]{1,64}(?: ?, ?[A-Za-z0-9_-]{1,64}){0,63}\z"
"""The headers that a page will send, as its browser lists them: echoed, so no other characters may be in it."""

# Engines must not decide which pages may read their answers: vLLM allows all.
_FORGET = "  http-after-response del-header access-control- -m beg"


def pages(origins: Sequence[str]) -> str:
    """The rules, placed before the check of the key. ``origins``: checked by ``Site``; empty: no page may call."""
    if not origins:
        return f"{_FORGET}\n"
    one = "{{ req.fhdr_cnt({0}) eq 1 }}".format
    headers = "access-control-request-headers"
    plain = f"{{ req.fhdr({headers}) -m reg '{_ASKED_FOR}' }}"
    return f"""\
  # Web pages that the site allows.
  acl origin req.fhdr(origin) -m str {" ".join(origins)}
  http-request set-var(txn.origin) req.fhdr(origin) if {one("origin")} origin
  acl from_page var(txn.origin) -m found
  acl preflight method OPTIONS
  http-request set-var(txn.asked) req.fhdr({headers}) if preflight from_page {one(headers)} {plain}
  http-request set-log-level silent if preflight from_page {one("access-control-request-method")}
  http-request return status 204 if preflight from_page {one("access-control-request-method")}
{_FORGET}
  http-after-response add-header vary origin
  http-after-response set-header access-control-allow-origin %[var(txn.origin)] if from_page
  http-after-response set-header access-control-expose-headers "{EXPOSED}" if from_page
  http-after-response set-header access-control-allow-methods "{METHODS}" if from_page {{ status 204 }}
  http-after-response set-header access-control-allow-headers %[var(txn.asked)] if {{ var(txn.asked) -m found }}
  http-after-response set-header access-control-max-age {_MAX_AGE_S} if from_page {{ status 204 }}
"""
