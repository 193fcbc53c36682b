"""What goes to the edge's socket, and how its answers are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.edge.socket_protocol import (
    ServerStat,
    kept_state,
    leave_commands,
    limit_commands,
    map_changes,
    map_text,
    model_name,
    open_commands,
    parse_map,
    parse_servers,
    refused,
    server_name,
    shared,
    show_servers,
    split_address,
)
from gateway_plugin.errors import EdgeError

MAP = Path("/state/edge/models.map")


@pytest.mark.parametrize("text", ["a b", "a;b", "a\nb", "a\\b", "", "a\tb", "a'b", "<<"])
def test_nothing_that_ends_a_command_goes_into_one(text: str) -> None:
    for call in (
        lambda: map_changes(MAP, {}, {text: "slot1"}),
        lambda: map_changes(MAP, {}, {"tiny": text}),
        lambda: map_changes(Path(f"/{text}x y"), {}, {"tiny": "slot1"}),
        lambda: map_text({text: "slot1"}),
        lambda: model_name(text),
        lambda: split_address(f"{text}:80"),
    ):
        with pytest.raises(EdgeError):
            call()


def test_servers_count_from_zero() -> None:
    assert server_name(3, 1) == "slot3/e1"
    with pytest.raises(EdgeError):
        server_name(-1, 0)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("10.0.0.1:8000", ("10.0.0.1", 8000)), ("[fe80::1]:9", ("fe80::1", 9)), ("::1:80", ("::1", 80))],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "node1:80", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "1.2.3.4:²"]
)
def test_no_addresses(address: str) -> None:
    with pytest.raises(EdgeError):
        split_address(address)


def test_open_goes_through_maint_and_says_healthy() -> None:
    assert open_commands(0, 2, "10.0.0.1:8000", 256) == (
        "set server slot0/e2 state maint",
        "set server slot0/e2 addr 10.0.0.1 port 8000",
        "set maxconn server slot0/e2 256",
        "set server slot0/e2 health up",
        "set server slot0/e2 state ready",
    )


def test_a_limit_taken_off_lets_go_on_what_waits() -> None:
    assert limit_commands(1, 0, 8) == ("set maxconn server slot1/e0 8",)
    assert limit_commands(1, 0, 0) == ("set maxconn server slot1/e0 1000000", "set maxconn server slot1/e0 0")
    with pytest.raises(EdgeError):
        limit_commands(1, 0, -1)


def test_a_map_is_changed_by_what_differs() -> None:
    have = {"gone": "slot0", "same": "slot1", "moved": "slot2"}
    want = {"same": "slot1", "moved": "slot3", "new": "slot0"}
    assert map_changes(MAP, have, want) == (
        f"del map {MAP} gone",
        f"set map {MAP} moved slot3",
        f"add map {MAP} new slot0",
    )
    assert map_changes(MAP, want, want) == ()


def test_maps_are_read_as_they_are_written() -> None:
    entries = {"tiny": "slot1", "org/name:1@x": "slot0"}
    assert parse_map(map_text(entries), numbered=False) == entries
    shown = "".join(f"0x55{n} {key} {value}\n" for n, (key, value) in enumerate(entries.items())) + "\n"
    assert parse_map(shown, numbered=True) == entries
    assert parse_map("# a comment\n\n", numbered=False) == {}
    with pytest.raises(EdgeError):
        parse_map("Unknown map identifier. Please use #<id> or <file>.\n", numbered=True)


HEAD = "# pxname,svname,qcur,scur,slim,stot,bout,status,lastsess,addr\n"


def test_servers_are_read() -> None:
    rows = (
        "slot0,e0,0,2,2,10,700,UP,5,10.0.0.1:8000\n"
        "slot0,e1,0,0,,0,,UP 1/3,-1,10.0.0.1:8001\n"
        "slot0,e2,0,1,,4,5,DRAIN,0,10.0.0.1:8002\n"
        "slot1,e0,0,0,,4,6,DOWN,9,10.0.0.1:8003\n"
        "slot0,BACKEND,1,3,,14,7,UP,9,\n"
        "slot1,BACKEND,5,3,,14,7,UP,9,\n"
        "ready,BACKEND,5,3,,14,7,UP,9,\n"
        "slot1,e1,0,0,,4,7,MAINT,9,10.0.0.1:8004\n"
        "slot1,cold,0,0,1000000,4,8,no check,9,unix\n"
        "ingress,ingress,,0,,4,9,no check,9,127.0.0.1:8181\n"
        "\n"
    )
    assert parse_servers(HEAD + rows + HEAD) == (
        ServerStat(0, 0, "10.0.0.1:8000", True, False, 2, 5, total=10, bytes_out=700, queued=1, limit=2),
        ServerStat(0, 1, "10.0.0.1:8001", up=True, draining=False, in_flight=0, idle_s=-1, total=0),
        ServerStat(0, 2, "10.0.0.1:8002", up=True, draining=True, in_flight=1, idle_s=0, total=4, bytes_out=5),
        ServerStat(1, 0, "10.0.0.1:8003", False, False, in_flight=0, idle_s=9, total=4, bytes_out=6, queued=5),
    )
    for answer in ("", "No such proxy.\n", "Unknown command\n"):
        with pytest.raises(EdgeError):
            parse_servers(answer)


def test_servers_of_some_slots_are_asked_for_by_slot() -> None:
    assert show_servers((0, 3)) == "show stat slot0 6 -1 no-maint;show stat slot3 6 -1 no-maint"
    assert show_servers(None).startswith("show stat -1 6 -1")


def test_the_kept_state_leaves_out_what_is_not_in_use() -> None:
    head = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state\n"
    used = "7 slot0 1 e0 10.0.0.1 2 4\n"
    drained = "7 slot0 2 e1 10.0.0.1 2 12\n"
    assert (
        kept_state(f"{head}{used}{drained}7 slot0 3 e2 127.0.0.1 0 5\n7 slot0 4 cold - 2 0\n\n")
        == head + used + drained
    )
    assert kept_state(head) == head
    for answer in ("", "1\n", "Permission denied\n\n"):
        with pytest.raises(EdgeError):
            kept_state(answer)


def test_what_the_edge_says_when_it_did_it() -> None:
    assert refused("\n") is None
    assert (
        refused("IP changed from '127.0.0.1' to '10.0.0.1', port changed from '1' to '80', by 'stats socket command'\n")
        is None
    )
    assert refused("no need to change the addr, port\n\n") is None
    assert refused("No such server.\n\n") == "No such server."
    assert "Unknown command" in (refused("IP changed from 'a' to 'b'\nUnknown command: 'x'\n") or "")


@given(st.integers(0, 50), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_a_queue_is_divided_among_those_that_take_requests(waiting: int, states: list[tuple[bool, bool]]) -> None:
    servers = [ServerStat(1, i, "h:1", up, draining, 0, 0.0, 0) for i, (up, draining) in enumerate(states)]
    other = ServerStat(2, 0, "h:2", True, False, 0, 0.0, 0)
    found = shared([*servers, other], {1: waiting})
    shares = [stat.queued for stat in found if stat.slot == 1]
    assert sum(shares) == waiting
    assert found[-1] == other
    taking = [up and not draining for up, draining in states]
    mine = [share for share, takes in zip(shares, taking, strict=True) if takes or not any(taking)]
    assert sum(mine) == waiting
    assert max(mine) - min(mine) <= 1


def test_what_waits_for_the_last_engine_is_let_go_with_it() -> None:
    assert leave_commands(3, 1, "drain") == ("set server slot3/e1 state drain", "set maxconn server slot3/cold 1000000")
