"""The configuration's text: what must be in it, and what must never get into it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gateway_plugin.edge.error_pages import Refusal, own_errors, refuse_script
from gateway_plugin.edge.haproxy_config import EdgeSettings, render, script
from gateway_plugin.edge.pages import EXPOSED
from gateway_plugin.edge.places import places
from gateway_plugin.errors import DeadlineTooEarly, InvalidRequest, ServiceError
from gateway_plugin.passing import FOUND_MODEL, INFERENCE
from gateway_plugin.paths import Layout
from gateway_plugin.site import Limits
from tests.support.edges import edge_site

PLACES = places(4096, 1000, 2, 3)


def settings(state: str = "/state", **changes: object) -> EdgeSettings:
    """``changes``: to the site."""
    if "certificate" in changes:
        changes["plain_http"] = False
    site = edge_site(8180).model_copy(update=changes)
    return EdgeSettings(Layout(Path(state)), site, "SECRET", PLACES, slots=2, servers_per_slot=3)


def section(text: str, name: str) -> str:
    """One section of a configuration."""
    found = re.search(rf"^{re.escape(name)}\n(.*?)(?=^[a-z]|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    return found[1]


def test_doors_are_private_and_the_front_is_on_loopback() -> None:
    text = render(settings())
    assert re.findall(r"^  bind (.*)$", text, re.MULTILINE) == [
        f"127.0.0.1:8180 maxconn {PLACES.callers} proto h1",
        f"unix@{settings().layout.owner_door} mode 600 maxconn {PLACES.owner} proto h1",
        f"unix@{settings().layout.inner_door} mode 600 maxconn {PLACES.inside} proto h1",
        f"unix@{settings().layout.cold_door} mode 600 maxconn {PLACES.inside} proto h1",
        f"unix@{settings().layout.around_door} mode 600 maxconn {PLACES.inside} proto h1",
    ]
    assert f"stats socket {settings().layout.edge_socket} mode 600 level admin" in text


@pytest.mark.parametrize(
    ("bind", "listens"), [("::1", "[::1]:8180"), ("localhost", "127.0.0.1:8180"), ("0.0.0.0", "0.0.0.0:8180")]
)
def test_addresses(bind: str, listens: str) -> None:
    assert f"  bind {listens} maxconn {PLACES.callers} proto h1\n" in render(settings(bind=bind))


def test_a_certificate_makes_the_front_door_tls() -> None:
    text = render(settings(certificate=Path("/etc/gw/cert.pem")))
    assert f"  bind 127.0.0.1:8180 ssl crt /etc/gw/cert.pem alpn http/1.1 maxconn {PLACES.callers} proto h1\n" in text


def test_no_door_speaks_http2() -> None:
    text = render(settings(certificate=Path("/etc/gw/cert.pem")))
    assert "  option disable-h2-upgrade" in section(text, "defaults")
    doors = re.findall(r"^  bind (.*)$", text, re.MULTILINE)
    assert doors
    assert all(door.endswith("proto h1") and "h2" not in door for door in doors)
    front = section(text, "frontend front")
    assert front.index("if !{ req.ver 1.0 1.1 }") < front.index("refuse_no_key")


def test_every_server_is_verified() -> None:
    text = render(settings())
    assert "ssl-server-verify required" in text
    for line in text.splitlines():
        assert "verify none" not in line
    for slot in range(2):
        backend = section(text, f"backend slot{slot}")
        assert "verify required verifyhost engine.gateway" in backend
        assert f"crt {settings().layout.edge_identity}" in backend
        assert f"map_str({settings().layout.slot_keys_map})" in backend
        assert "server-template e 0-2 engine.gateway:1 init-addr last,127.0.0.1 disabled" in backend
        assert "backup" in backend
    desk = section(text, "backend desk")
    assert f"server desk unix@{settings().layout.desk_socket} maxconn" in desk
    for backend in ("backend ingress", "backend apart"):
        assert f"server ingress unix@{settings().layout.ingress_socket}" in section(text, backend)
    assert "backend slot2" not in text


def test_the_secret_is_said_to_ingress_and_desk_alone() -> None:
    text = render(settings())
    assert text.count("SECRET") == 5
    for backend in ("backend ingress", "backend desk", "backend ready"):
        assert "SECRET" in section(text, backend)
    assert section(text, "backend apart").count("SECRET") == 2
    assert "del-header x-gateway-edge\n" in section(text, "frontend around_door"), "what lies there is an engine"
    assert "SECRET" not in script(settings())


def test_a_caller_is_known_before_its_body_is_awaited() -> None:
    """And before that nothing it said about itself counts."""
    front = section(render(settings()), "frontend front")
    order = [
        "url_beg",
        "refuse_no_key",
        "track-sc0",
        "refuse_method",
        "refuse_path",
        "refuse_role",
        "refuse_compressed",
    ]
    order += ["refuse_body_too_large", "del-header x-gateway- -m beg\n", "set-header x-gateway-role"]
    order += ["http-request wait-for-body", "json_query", "use_backend"]
    places = [front.index(word) for word in order]
    assert places == sorted(places)
    assert "http-buffer-request" not in render(settings())


def test_the_ingress_says_which_model_it_found_and_callers_do_not_see_it() -> None:
    backend = section(render(settings()), "backend ingress")
    assert f"http-response set-var(txn.model) res.fhdr({FOUND_MODEL})" in backend
    for each in (backend, section(render(settings()), "backend apart")):
        assert f"http-response del-header {FOUND_MODEL}" in each


def test_the_allow_list_is_exact() -> None:
    front = section(render(settings()), "frontend front")
    (line,) = [line for line in front.splitlines() if line.startswith("  acl inference ")]
    assert line == "  acl inference path " + " ".join(INFERENCE)
    development = ("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache", "/server_info")
    for path in (*development, "/invocations", "/update_weights", "/inference/v1/generate"):
        assert path not in INFERENCE


def test_patterns_do_not_end_before_a_newline() -> None:
    front = section(render(settings()), "frontend front")
    for pattern in re.findall(r"(?:-m reg|path_reg)(?: -i)? (\S+)", front):
        assert "$" not in pattern
        assert r"\z" in pattern or pattern.startswith("'^bearer"), pattern


@pytest.mark.parametrize(
    "path", ["/a b/keys.map", "/a;b/keys.map", "/a,b/keys.map", "/a'b/k", "/a)b/k", "/a\nb", "/a#b"]
)
def test_a_path_that_would_break_the_text_is_refused(path: str) -> None:
    for refused in (settings(path), settings(certificate=Path(path))):
        with pytest.raises(ServiceError, match="letters, digits"):
            render(refused)


def test_pages_are_named_exactly_or_none_may_ask() -> None:
    front = section(render(settings()), "frontend front")
    assert "preflight" not in front
    assert "access-control-allow" not in front
    assert "http-after-response del-header access-control- -m beg" in front
    allowed = section(render(settings(cors_origins=("https://a.example", "http://localhost:3000"))), "frontend front")
    assert "acl origin req.fhdr(origin) -m str https://a.example http://localhost:3000\n" in allowed
    assert "credentials" not in allowed
    order = ["refuse_body_without_post", "return status 204 if preflight from_page", "refuse_no_key"]
    places = [allowed.index(word) for word in order]
    assert places == sorted(places)


def test_limits_are_those_of_the_site() -> None:
    limits = Limits(body_bytes=5000, in_flight_per_key=7, requests_per_key_10s=11, wait_s=9000)
    made = EdgeSettings(Layout(Path("/state")), edge_site(8180, limits), "SECRET", PLACES)
    text = render(made)
    assert "gt 5000 }" in text
    assert "sc_conn_cur(0,limits) gt 7" in text
    many = render(settings(limits=Limits(in_flight_per_key=PLACES.cold)))
    assert f"sc_conn_cur(0,limits) gt {PLACES.cold // 2} " in many, "no key can take all places of those that wait"
    assert "sc_http_req_rate(0,limits) gt 11" in text
    assert "timeout server 9600s" in text
    assert "option srvtcpka " in text
    assert "5000 bytes" in script(made)


def test_who_is_not_let_in_is_read_out_only_while_there_is_room() -> None:
    lines = section(render(settings()), "frontend front").partition("  # 5. ")[0].splitlines()
    crowded = f"{{ sc_conn_cur(2,busy) gt {PLACES.refused} }}"
    counted = [line for line in lines if "track-sc2 int(3) table busy" in line]
    refusals = [number for number, line in enumerate(lines) if "lua.refuse_" in line]
    assert len(refusals) == 8
    for number in refusals:
        condition = lines[number].partition(" if ")[2]
        assert any(condition in line for line in counted)
        assert lines[number - 1].startswith("  http-request return status ")
        at_once = " or ".join(f"{crowded} {term}" for term in condition.split(" or "))
        assert lines[number - 1].endswith(f" if {at_once}")


def test_own_errors_are_one_a_status_in_openais_form() -> None:
    errors = own_errors()
    assert len({error.status for error in errors}) == len(errors)
    assert {400, 401, 403, 404, 405, 408, 413, 429, 500, 502, 503, 504} == {error.status for error in errors}
    defaults = section(render(settings()), "defaults")
    for line in defaults.splitlines():
        if "http-error" in line:
            body = json.loads(line.split("'")[1])
            assert set(body["error"]) >= {"message", "type", "code", "param"}
    unavailable = next(line for line in defaults.splitlines() if "http-error status 503" in line)
    assert "hdr Retry-After" in unavailable
    assert {"state", "eta_s"} <= set(json.loads(unavailable.split("'")[1])["error"])


def test_the_script_has_every_refusal_that_the_rules_name() -> None:
    named = set(re.findall(r"lua\.refuse_(\w+)", render(settings())))
    there = set(re.findall(r'^refuse\("(\w+)"', script(settings()), re.MULTILINE))
    assert named == there
    assert "WWW-Authenticate" in script(settings())


def test_a_refusal_may_say_another_thing_for_some_paths() -> None:
    text = refuse_script([Refusal("x", InvalidRequest("usual"), variants=(("^/a", InvalidRequest('odd "one"')),))])
    assert '{{"^/a", "{\\"error\\"' in text
    (line,) = [line for line in script(settings()).splitlines() if line.startswith('refuse("path"')]
    for pattern in ("^/v1/v1", "//", "^/v1/batches"):
        assert f'{{"{pattern}", ' in line


def test_the_script_cannot_be_broken_by_a_message() -> None:
    text = refuse_script([Refusal("x", InvalidRequest('a "quoted" \\ back\nslash\'s é'))])
    (line,) = [line for line in text.splitlines() if line.startswith("refuse(")]
    inside = line.rpartition(', "')[2].removesuffix('")')
    assert json.loads(inside.replace('\\"', '"').replace("\\\\", "\\"))["error"]["message"].startswith(
        'a "quoted" \\ back'
    )


def test_pages_of_other_origins_may_read_all_headers_of_a_refusal() -> None:
    headers = {name.lower() for name in DeadlineTooEarly("late", position=3, retry_after_s=9).headers()}
    assert len(headers) == 3
    assert headers <= {*EXPOSED.split(", ")}
