"""The front door, the listener for callers: rules in the order of evaluation. Pure text.

The order matters. A caller without a key is refused before its body is awaited, a path that is not served before any
look-up, and identity headers that a caller sent are removed before the edge sets its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gateway_plugin.edge.error_pages import Refusal
from gateway_plugin.edge.floods import REFUSALS, refuse_outsiders, sources, tables
from gateway_plugin.edge.hints import COMPRESSED, NO_PATH, STREAM_OF_HTTP_1_0, TWO_KEYS, no_chunks, plainer_words
from gateway_plugin.edge.pages import pages
from gateway_plugin.edge.patience import NOT_PATIENCE, READ_PATIENCE, TELL_PATIENCE
from gateway_plugin.edge.places import Places
from gateway_plugin.edge.served import MODEL, PATHS
from gateway_plugin.edge.turns import priority
from gateway_plugin.errors import (
    BodyTooLarge,
    Forbidden,
    GoingDown,
    InvalidKey,
    InvalidRequest,
    MethodNotAllowed,
    RateLimited,
)
from gateway_plugin.passing import PRIORITY
from gateway_plugin.paths import Layout
from gateway_plugin.site import Site

BUFFER_BYTES = 65536
"""A request's head and the part of its body that rules inspect must fit in here."""
HEAD_BYTES = BUFFER_BYTES // 2
"""Limit of the request's headers, so that some of the body always fits beside them."""

APART = "/apart"
"""Suffix of the slot of a model kept apart, one of whose engines died recently: all of its requests go through the
ingress, which records what each of them did (``serve.ingress.trials``), and around it while it is down
(``gateway_plugin.edge.apart``)."""

_CARD = r"^/v1/models/[A-Za-z0-9](?:[A-Za-z0-9._/:@+-]|%2[BbFf]|%3[Aa]|%40){0,200}\z"
"""One model of the catalog; clients may escape characters of a name other than letters, digits and ``._-``."""
_ADMIN = r"^/gateway/v1(?:/[a-z][a-z0-9_-]{0,40}){1,4}\z"
_CALLER = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\z"
"""On whose behalf an endpoint asks: a Globus identity."""
_CREDENTIAL = r"[A-Za-z0-9._~+/=-]{1,256}\z"

_LENGTH_DIGITS = 12
"""Limit of digits in ``Content-Length``. No site's limit is a terabyte."""

_USAGE = (
    '{"time":%Ts.%ms,"request":"%ID","key":"%[var(txn.key,-)]","caller":"%[var(txn.caller,-)]","model":"%[var(txn.model,-)]","method":"%HM",'
    '"path":"%[var(txn.route,-)]","status":%ST,"bytes_in":%U,"bytes_out":%B,"ms":%Ta,'
    '"first_byte_ms":%[var(sess.first,-1)],"where":"%b/%s","retries":"%rc","end":"%ts"}'
)
"""The usage log. Every field is a number, set by the gateway, or checked against a pattern, so no field from a caller
needs escaping."""

_FOUND_KEY = "{ var(txn.who) -m found }"
_HAS_MODEL = "{ var(txn.model) -m found }"
HAS_SLOT = "{ var(txn.slot) -m found }"
_ONE_BEARER = (
    "{ req.fhdr_cnt(authorization) eq 1 } { req.fhdr_cnt(x-api-key) eq 0 } "
    rf"{{ req.fhdr(authorization) -m reg -i '^bearer +{_CREDENTIAL}' }}"
)
_ONE_PLAIN = (
    "{ req.fhdr_cnt(authorization) eq 0 } { req.fhdr_cnt(x-api-key) eq 1 } "
    f"{{ req.fhdr(x-api-key) -m reg '^{_CREDENTIAL}' }}"
)
_BOTH = (
    "{ req.fhdr_cnt(x-api-key) eq 1 } { req.fhdr_cnt(authorization) eq 1 } "
    rf"{{ req.fhdr(authorization) -m reg -i '^bearer +{_CREDENTIAL}' }} "
    f"{{ req.fhdr(x-api-key) -m reg '^{_CREDENTIAL}' }}"
)
"""Some clients send their key in both headers: the same key twice counts as one."""

_NOT_HTTP_1 = Refusal("version", InvalidRequest("The gateway speaks HTTP/1.1."))
_NOT_A_PATH = Refusal("not_a_path", InvalidRequest("The request target is not a path."))
_HEAD_TOO_LARGE = Refusal(
    "head_too_large", InvalidRequest(f"The request's head is over the gateway's limit of {HEAD_BYTES} bytes.")
)
_BODY_WITHOUT_POST = Refusal("body_without_post", InvalidRequest("Only a POST has a body here."))
_GOING_DOWN = Refusal("going_down", GoingDown())
_NO_KEY = Refusal(
    "no_key", InvalidKey("Give exactly one API key: as 'Authorization: Bearer KEY', or as 'x-api-key: KEY'.")
)
_UNKNOWN_KEY = Refusal("unknown_key", InvalidKey("This API key is not known here; it may have been revoked."))
_WRONG_METHOD = Refusal("method", MethodNotAllowed("The path is served, but not with this method."))
_NOT_ADMIN = Refusal("role", Forbidden("This needs an admin key."))
NOT_A_MODEL = Refusal("model", InvalidRequest("The header x-gateway-model does not name one model."))
_NOT_A_CALLER = Refusal(
    "caller", InvalidRequest("The header x-gateway-caller is one identity: up to 64 letters, digits and . _ @ -")
)


@dataclass(frozen=True)
class FrontSettings:
    """Input of the front door's configuration."""

    listen: str
    """Address, port and options."""
    layout: Layout
    site: Site
    places: Places

    @property
    def in_flight_per_key(self) -> int:
        """Refusal: too many requests in all, by the site's limit and the open files."""
        return self.places.of_one_key(self.site.limits.in_flight_per_key)

    @property
    def too_fast(self) -> Refusal:
        """Refusal: the request rate of the key."""
        limit = f"This key made over {self.site.limits.requests_per_key_10s} requests within 10 s, its limit."
        return Refusal("too_fast", RateLimited(limit, retry_after_s=5))

    @property
    def too_many(self) -> Refusal:
        """Refusal: the requests in flight of the key."""
        limit = f"This key has over {self.in_flight_per_key} requests in flight, its limit."
        return Refusal("too_many", RateLimited(limit, retry_after_s=1))

    @property
    def too_large(self) -> Refusal:
        """Refusal: the announced length of the body."""
        return Refusal("body_too_large", BodyTooLarge(self.site.limits.body_bytes))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """All refusals of the doors."""
        fixed = (
            _NOT_A_PATH,
            _BODY_WITHOUT_POST,
            _GOING_DOWN,
            _NO_KEY,
            TWO_KEYS,
            _UNKNOWN_KEY,
            _WRONG_METHOD,
            NO_PATH,
            _NOT_ADMIN,
            COMPRESSED,
            STREAM_OF_HTTP_1_0,
            *NOT_PATIENCE,
            *REFUSALS,
        )
        return (*fixed, NOT_A_MODEL, _NOT_A_CALLER, self.too_fast, self.too_many, self.too_large)


def front_door(settings: FrontSettings) -> str:
    """The frontend that callers reach, and its tables of limits."""
    return "\n".join(
        (
            _begin(settings),
            pages(settings.site.cors_origins),
            _keyless(),
            _who(settings.layout.keys_map, settings.places),
            _limits(settings),
            _what(settings),
            _tell(),
            _where(settings.layout.models_map),
            "backend limits\n  stick-table type string len 64 size 10k expire 1h store http_req_rate(10s),conn_cur\n",
            "backend held\n  stick-table type string len 80 size 10k expire 1s store conn_cur\n",
            "backend gate\n  stick-table type string len 8 size 100 store gpc0\n",
            tables(),
        )
    )


def _begin(settings: FrontSettings) -> str:
    plain = refuse_outsiders(
        settings.places,
        (_NOT_A_PATH, "!{ url_beg / }"),
        (_BODY_WITHOUT_POST, "!is_post has_body or !is_post chunked or !is_post endless"),
        (_GOING_DOWN, "{ str(down),in_table(gate) } !admin !metrics"),
    )
    return f"""\
frontend front
  bind {settings.listen}
  bind unix@{settings.layout.owner_door} mode 600 maxconn {settings.places.owner} proto h1
  # For a caller's handshake, sending and reading; waiting for an answer may take longer.
  timeout client 30s
.if version_atleast(2.9)
  timeout client-hs 5s
.endif
{sources(settings.places)}\
  log stdout format raw daemon info
  log-format '{_USAGE}'
  unique-id-format %[uuid()]
  http-request set-var(txn.no_chunks) bool(true) if {{ req.ver 1.0 }}
  http-request set-var(txn.began) date(0,ms)
  # Session scope: input that is not HTTP has no transaction, and its line in the usage log must be JSON too.
  http-request set-var(sess.first) int(-1)
  http-response set-var(sess.first) date(0,ms),sub(txn.began)
{plainer_words()}\
{no_chunks("{ var(txn.no_chunks) -m found }")}\
  http-after-response set-header x-gateway-request %[unique-id]
  # A caller without a valid key, or refused for lack of room, keeps no connection.
  http-after-response set-header connection close if !{{ var(txn.who) -m found }} or {{ status 503 }}
  # A caller that disconnected before the answer, or closed its sending half: no bad request (nginx's 499).
  http-after-response set-status 499 if {{ status 400 }} !{{ be_name front }} {{ var(sess.first) -m int lt 0 }}
{PATHS}
  acl list path /v1/models
  acl card path_reg {_CARD}
  acl dots path_sub ..
  acl admin path_reg {_ADMIN}
  acl metrics path /metrics /metrics/edge
  acl no_key_needed path /health /ready
  acl chunked req.fhdr_cnt(transfer-encoding) gt 0
  # Not hdr_val(content-length), which has 32 bits: it reads 4294967296 as 0. And HAProxy itself reads 2^64 as 0.
  acl endless req.fhdr(content-length),length gt {_LENGTH_DIGITS}
  acl has_body req.body_size gt 0

  # 1. Not a plain request of this server.
  {_NOT_HTTP_1.at_once()} if !{{ req.ver 1.0 1.1 }}
  {_HEAD_TOO_LARGE.at_once()} if {{ req.hdrs,length gt {HEAD_BYTES} }}
  # Or the gateway shuts down (closing.py). Administrators still have access.
{plain}

"""


def _keyless() -> str:
    return """\
  # 2. Paths without a key.
  http-request set-log-level silent if is_get no_key_needed
  http-request return status 200 content-type application/json string '{"status":"ok"}' if is_get { path /health }
  http-request del-header x-gateway- -m beg if is_get no_key_needed
  http-request allow if is_get no_key_needed
"""


def _who(keys_map: Path, places: Places) -> str:
    unknown = refuse_outsiders(
        places,
        (_UNKNOWN_KEY, f"!{_FOUND_KEY} {{ var(txn.digest) -m found }}"),
        (TWO_KEYS, f"!{_FOUND_KEY} {{ var(txn.twin) -m found }}"),
        (_NO_KEY, f"!{_FOUND_KEY}"),
    )
    twins = "{ var(txn.twin) -m found } { req.fhdr(x-api-key),sha2(256),hex,strcmp(txn.twin) eq 0 }"
    return f"""\
  # 3. Exactly one credential, of a known key.
  http-request set-var(txn.digest) 'req.fhdr(authorization),word(2," "),sha2(256),hex' if {_ONE_BEARER}
  http-request set-var(txn.digest) req.fhdr(x-api-key),sha2(256),hex if {_ONE_PLAIN}
  http-request set-var(txn.twin) 'req.fhdr(authorization),word(2," "),sha2(256),hex' if {_BOTH}
  http-request set-var(txn.digest) var(txn.twin) if {twins}
  http-request set-var(txn.who) var(txn.digest),map_str({keys_map})
{unknown}
  http-request set-var(txn.role) var(txn.who),field(1,:)
  http-request set-var(txn.key) var(txn.who),field(2,:)
"""


def _limits(settings: FrontSettings) -> str:
    past = refuse_outsiders(
        settings.places,
        (settings.too_fast, f"{{ sc_http_req_rate(0,limits) gt {settings.site.limits.requests_per_key_10s} }}"),
        (settings.too_many, f"{{ sc_conn_cur(0,limits) gt {settings.in_flight_per_key} }}"),
    )
    return f"""\
  # 4. Limits of one key.
  http-request track-sc0 var(txn.key) table limits
  # Track every request under its key's digest, so that a key's requests can be cut when it is revoked (admission.py).
  http-request set-var-fmt(txn.number) %rt
  http-request track-sc1 var(txn.digest),concat(/,txn.number) table held
{past}
"""


def _what(settings: FrontSettings) -> str:
    named = "{ req.fhdr_cnt(x-gateway-model) gt 0 }"
    return f"""\
  # 5. An allow-list: engines have other paths, which must not be reachable.
  # (A warm request has an inference path: the other rules are evaluated only for other paths.)
{_WRONG_METHOD.when("inference !is_post")}
{_WRONG_METHOD.when("!inference !is_get list or !inference !is_get metrics or !inference !is_get card !dots")}
{_WRONG_METHOD.when("!inference !is_get !is_post admin or !inference no_key_needed")}
{NO_PATH.when("!inference !list !metrics !admin !card or !inference card dots")}
  http-request set-var(txn.route) path if inference or list or metrics or admin
  http-request set-var(txn.route) str(/v1/models/NAME) if !inference card
  acl is_admin var(txn.role) -m str admin
{_NOT_ADMIN.when("!inference metrics !is_admin or !inference admin !is_admin")}
{COMPRESSED.when("{ req.fhdr_cnt(content-encoding) gt 0 } !{ req.fhdr(content-encoding) -m str -i identity }")}
{COMPRESSED.when("{ req.fhdr_cnt(content-encoding) gt 1 }")}
{settings.too_large.when(f"{{ req.body_size gt {settings.site.limits.body_bytes} }} or endless")}
{NOT_A_MODEL.when(f"{named} !{{ req.fhdr(x-gateway-model) -m reg {MODEL} }}")}
{NOT_A_MODEL.when("{ req.fhdr_cnt(x-gateway-model) gt 1 }")}
  http-request set-var(txn.model) req.fhdr(x-gateway-model) if inference {named}
{READ_PATIENCE}\
{priority()}\
  # Only an endpoint's key may name the user on whose behalf it asks.
  acl for_another var(txn.role) -m str endpoint
  acl caller req.fhdr(x-gateway-caller) -m reg {_CALLER}
{_NOT_A_CALLER.when("for_another { req.fhdr_cnt(x-gateway-caller) gt 0 } !caller")}
{_NOT_A_CALLER.when("for_another { req.fhdr_cnt(x-gateway-caller) gt 1 }")}
  http-request set-var(txn.caller) req.fhdr(x-gateway-caller) if for_another caller
"""


def _tell() -> str:
    return f"""\
  # 6. Remove the caller's identity headers; set the edge's own.
  http-request del-header x-gateway- -m beg
  http-request del-header authorization
  http-request del-header x-api-key
  http-request del-header upgrade
  # No identity on requests that may go to an engine.
  http-request set-header x-gateway-key %[var(txn.key)] if !inference
  http-request set-header x-gateway-role %[var(txn.role)] if !inference
  http-request set-header x-gateway-tag %[var(txn.digest),xxh64] if inference
  acl named var(txn.caller) -m found
  http-request set-var(txn.person) var(txn.digest),concat(/,txn.caller),sha2(256),hex,bytes(0,16) if named
  http-request set-header x-gateway-caller %[var(txn.person)] if named
  http-request set-header x-gateway-request %[unique-id]
  http-request set-header x-gateway-arrived %[var(txn.began)]
{TELL_PATIENCE}\
  http-request set-header {PRIORITY} batch if {{ var(txn.batch) -m found }}
.if feature(PROMEX)
  http-request set-query no-maint if is_get {{ path /metrics/edge }}
  http-request use-service prometheus-exporter if is_get {{ path /metrics/edge }}
.endif
"""


def _where(models_map: Path) -> str:
    # A chunked body has no length until its end. Past half the buffer (the head may take the other half) it may
    # not have been seen whole, and only the ingress can apply the limit.
    return f"""\
  # 7. The model, and so the slot; the body is awaited only here.
  http-request wait-for-body time 30s if inference
{STREAM_OF_HTTP_1_0.when("{ req.ver 1.0 } inference { req.body,json_query('$.stream') -m bool }")}
  http-request set-var(txn.model) req.body,json_query('$.model') if inference !{_HAS_MODEL}
  # Check the name before any use: a map compares only the part of a name before a NUL.
  http-request unset-var(txn.model) if {_HAS_MODEL} !{{ var(txn.model) -m reg {MODEL} }}
  http-request set-var(txn.slot) var(txn.model),map_str({models_map}) if {_HAS_MODEL}
  http-request set-var(txn.head) req.hdrs,length if chunked
  http-request unset-var(txn.slot) if chunked {{ req.body_len,add(txn.head) gt {BUFFER_BYTES // 2} }}
  http-request set-header x-gateway-model %[var(txn.model)] if {_HAS_MODEL}
  use_backend ready if no_key_needed
  use_backend desk if !inference
  use_backend apart if {{ var(txn.slot) -m end {APART} }}
  use_backend %[var(txn.slot)] if {HAS_SLOT}
  default_backend ingress
"""
