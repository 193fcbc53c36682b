"""API keys without an edge: what is kept, what is not."""

from __future__ import annotations

import fcntl
import hashlib
import json
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway_plugin.edge.keys import CLI_KEY_NAME, KeyStore
from gateway_plugin.errors import EdgeError, InvalidRequest, NotFound, ServiceError
from gateway_plugin.files import write_private
from gateway_plugin.paths import Layout
from tests.support.disks import full_disk


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    return Layout(tmp_path / "state")


def test_only_the_hash_is_kept(layout: Layout) -> None:
    store = KeyStore(layout)
    secret = store.create("ann", "user")
    assert secret.startswith("gw-")
    assert len(secret) > 40
    for path in (layout.keys_json, layout.keys_map):
        assert secret not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert layout.keys_map.read_text() == f"{digest.upper()} user:ann\n"
    (key,) = store.list()
    assert (key.name, key.role, key.sha256) == ("ann", "user", digest)


def test_revoked_is_gone_from_both_files(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    store.create("root", "admin")
    store.revoke("ann")
    assert [key.name for key in store.list()] == ["root"]
    assert layout.keys_map.read_text().endswith(" admin:root\n")
    assert layout.keys_map.read_text().count("\n") == 1
    with pytest.raises(NotFound, match="'ann'"):
        store.revoke("ann")


def test_names_and_roles_are_checked(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    with pytest.raises(InvalidRequest, match="already"):
        store.create("ann", "admin")
    for name in ("", "a b", "a:b", "a;b", "a\nb", "é", "-a", "x" * 65, '"'):
        with pytest.raises(InvalidRequest):
            store.create(name, "user")
    with pytest.raises(InvalidRequest, match="user, endpoint, admin"):
        store.create("bob", "root")  # type: ignore[arg-type]
    assert [key.name for key in store.list()] == ["ann"]


def test_two_at_a_time_lose_none(layout: Layout) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: KeyStore(layout).create(f"key{number}", "user"), range(16)))
    assert len(set(secrets)) == 16
    assert len(KeyStore(layout).list()) == 16
    assert layout.keys_map.read_text().count("\n") == 16


def test_a_lost_map_is_written_again_and_a_damaged_store_is_not_overwritten(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    before = layout.keys_map.read_text()
    layout.keys_map.unlink()
    store.write_map()
    assert layout.keys_map.read_text() == before
    layout.keys_json.write_text('{"keys": [{"name": "ann"')
    with pytest.raises(ServiceError, match="is garbled"):
        store.create("bob", "user")
    assert layout.keys_json.read_text() == '{"keys": [{"name": "ann"'


def admitted(layout: Layout) -> bool:
    """Whether the edge would let the command line in as an administrator."""
    digest = hashlib.sha256(layout.admin_key.read_bytes()).hexdigest().upper()
    return f"{digest} admin:{CLI_KEY_NAME}\n" in layout.keys_map.read_text()


def test_revoking_the_command_lines_own_key_replaces_it(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    store.keep_cli_key()
    before = layout.admin_key.read_text()
    assert admitted(layout)
    store.revoke(CLI_KEY_NAME)
    assert layout.admin_key.read_text() != before
    assert admitted(layout)
    assert hashlib.sha256(before.encode()).hexdigest().upper() not in layout.keys_map.read_text()
    assert [key.name for key in store.list()] == ["ann", CLI_KEY_NAME]
    assert stat.S_IMODE(layout.admin_key.stat().st_mode) == 0o600


def test_a_command_lines_key_that_the_store_does_not_know_is_made_anew(layout: Layout) -> None:
    store = KeyStore(layout)
    store.keep_cli_key()
    kept = layout.admin_key.read_text()
    store.keep_cli_key()
    assert layout.admin_key.read_text() == kept
    for spoil in (
        lambda: layout.admin_key.write_text("gw-unknown"),
        lambda: layout.admin_key.write_bytes(b""),
        lambda: layout.admin_key.unlink(),
        lambda: layout.keys_json.unlink(),
        lambda: layout.admin_key.write_text(store.create("ann", "user")),
    ):
        spoil()
        store.keep_cli_key()
        assert admitted(layout)
        assert sum(key.name == CLI_KEY_NAME for key in store.list()) == 1


def runs_on(layout: Layout, host: str, supervisor: object) -> None:
    """Write ``service.json`` as ``up`` did on ``host``."""
    record = {
        "site": "local", "site_reference": "local", "catalog": "/x", "url": "http://127.0.0.1:8180",
        "bind": "127.0.0.1", "port": 8180, "tls": False, "head_address": "10.0.0.1", "ray_port": 6390,
        "host": host, "supervisor": supervisor,
    }  # fmt: skip
    layout.service_json.write_text(json.dumps(record))


def test_on_another_machine_than_the_gateways_nothing_is_said_to_be_done(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    before = layout.keys_json.read_text(), layout.keys_map.read_text()
    runs_on(layout, "login01.other", {"pid": 4242, "started": 1.0})
    with pytest.raises(ServiceError, match=r"runs on login01\.other: run this command there"):
        store.revoke("ann")
    with pytest.raises(ServiceError, match=r"runs on login01\.other"):
        store.create("bob", "user")
    assert (layout.keys_json.read_text(), layout.keys_map.read_text()) == before
    runs_on(layout, "login01.other", None)  # it is down: there is no edge to tell
    store.revoke("ann")
    assert store.list() == ()
    runs_on(layout, socket.gethostname(), {"pid": 4242, "started": 1.0})
    store.create("bob", "user")


class LateEdge:
    """An edge that does not answer in time until it does; in place of ``keys.ask``."""

    def __init__(self) -> None:
        self.late = True
        self.held = "# table: held, type: string, size:10240, used:0\n\n"
        self.map: dict[str, str] = {}

    def __call__(self, path: Path, command: str) -> str:
        if self.late:
            raise EdgeError("The edge does not answer.") from TimeoutError()
        for words in (part.split() for part in command.split(";")):
            match words:
                case ["add", "map", _, key, value]:
                    self.map[key] = value
                case ["del", "map", _, key]:
                    del self.map[key]
                case ["show", "table", *_]:
                    return self.held
                case ["show", "map", _]:
                    return "".join(f"0x{n:x} {key} {value}\n" for n, (key, value) in enumerate(self.map.items()))
                case _:
                    raise AssertionError(words)
        return "\n"


@pytest.fixture
def late_edge(monkeypatch: pytest.MonkeyPatch) -> LateEdge:
    edge = LateEdge()
    monkeypatch.setattr("gateway_plugin.edge.keys.ask", edge)
    return edge


def test_a_key_that_the_edge_did_not_forget_is_kept_as_revoked(layout: Layout, late_edge: LateEdge) -> None:
    store = KeyStore(layout)
    late_edge.late = False
    store.create("bob", "user")
    late_edge.late = True
    for _ in range(2):
        with pytest.raises(EdgeError, match="'bob' may still be in use"):
            store.revoke("bob")
        assert [key.revoked for key in store.list()] == [True]
        assert layout.keys_map.read_text() == ""  # an edge that starts refuses it
        assert list(late_edge.map.values()) == ["user:bob"]
    with pytest.raises(EdgeError):
        store.keep_in_force()
    late_edge.late = False
    store.revoke("bob")
    assert late_edge.map == {}
    assert store.list() == ()


def no_room(path: Path, _content: object) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_a_key_on_a_full_disk_is_not_made_and_the_edge_does_not_have_it(
    layout: Layout, late_edge: LateEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_edge.late = False
    store = KeyStore(layout)
    store.create("ann", "user")
    with monkeypatch.context() as full:
        full.setattr("gateway_plugin.state_file.write_private", no_room)
        with pytest.raises(ServiceError, match=r"'bob' was not made: .*keys.json cannot be written .*No space"):
            store.create("bob", "user")
        with pytest.raises(ServiceError, match=r"'ann' was not revoked: .*make room"):
            store.revoke("ann")
        assert list(late_edge.map.values()) == ["user:ann"]
    assert [key.name for key in store.list()] == ["ann"]
    store.create("bob", "user")
    assert sorted(late_edge.map.values()) == ["user:ann", "user:bob"]


def test_a_key_counts_though_the_map_on_disk_is_late(
    layout: Layout, late_edge: LateEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_edge.late = False
    store = KeyStore(layout)

    def store_only(path: Path, content: str) -> None:
        if path == layout.keys_map:
            no_room(path, content)
        write_private(path, content)

    with monkeypatch.context() as full:
        full.setattr("gateway_plugin.edge.keys.write_private", store_only)
        store.create("ann", "user")
        store.create("bob", "user")
        store.revoke("bob")
        assert list(late_edge.map.values()) == ["user:ann"]
        with pytest.raises(OSError, match="No space"):
            store.keep_in_force()
    store.keep_in_force()
    assert "user:ann" in layout.keys_map.read_text()
    assert [key.name for key in store.list()] == ["ann"]


GARBLED_KEYS = ("", "{", "[]", '{"keys": 7}', '{"keys": [{"name": "x"}]}', '{"keys": ["x"]}', "\x00\x01", '{"k": []}')


@pytest.mark.parametrize("garbled", GARBLED_KEYS)
def test_garbled_keys_are_kept_and_those_of_the_map_taken(layout: Layout, garbled: str) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    store.create("root", "admin")
    before = layout.keys_map.read_text()
    layout.keys_json.write_text(garbled)
    with pytest.raises(ServiceError, match="is garbled"):
        store.list()
    assert "keys.json.garbled" in store.recover()
    assert sorted((key.name, key.role) for key in store.list()) == [("ann", "user"), ("root", "admin")]
    assert layout.keys_map.read_text() == before
    assert (layout.state / "keys.json.garbled").read_text() == garbled
    assert store.recover() == ""


@pytest.mark.parametrize("created", ["today", True, None, [], -1, 1e300, float("nan")])
def test_a_date_that_is_none_is_told_and_not_shown(layout: Layout, created: object) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    document = json.loads(layout.keys_json.read_text())
    document["keys"][0]["created"] = created
    layout.keys_json.write_text(json.dumps(document))
    with pytest.raises(ServiceError, match="is garbled"):
        store.list()
    store.recover()
    assert [key.name for key in store.list()] == ["ann"]


@pytest.mark.parametrize("copy", ["", "garbled", "\x00"])
def test_a_gateway_never_starts_without_the_keys_it_had(layout: Layout, copy: str) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    layout.keys_json.write_text("{")
    layout.keys_map.write_text(copy)
    with pytest.raises(ServiceError, match="put the file back from a copy"):
        store.recover()
    assert layout.keys_json.read_text() == "{"


def test_a_map_with_other_things_than_keys_names_none(layout: Layout) -> None:
    KeyStore(layout).create("ann", "user")
    layout.keys_json.write_text("{")
    with layout.keys_map.open("a") as copy:
        copy.write("two words\n")
    with pytest.raises(ServiceError, match="put the file back from a copy"):
        KeyStore(layout).recover()


def test_garbled_keys_on_a_full_disk_are_lost_by_no_try(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    layout.keys_json.write_text("{")
    for _ in range(2):
        with full_disk(), pytest.raises(OSError, match="No space"):
            store.recover()
        with full_disk(), pytest.raises(ServiceError, match="is garbled"):
            store.keep_cli_key()
    assert "keys.json.garbled now" in store.recover()
    assert [key.name for key in store.list()] == ["ann"]


@pytest.mark.parametrize("trace", ["keys.json.garbled", "keys.map"])
def test_a_missing_store_is_not_taken_for_a_new_one_where_there_were_keys(layout: Layout, trace: str) -> None:
    store = KeyStore(layout)
    assert store.recover() == ""
    store.create("ann", "user")
    layout.keys_json.unlink()
    if trace == "keys.json.garbled":
        layout.keys_map.unlink()
        (layout.state / trace).write_text("{")
    with pytest.raises(ServiceError, match=f"keys.json is missing.*{trace}"):
        store.recover()
    with pytest.raises(ServiceError, match=f"keys.json is missing.*{trace}"):
        store.create("bob", "user")  # the running edge would forget all others


def test_keys_of_a_later_version_are_read(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    document = json.loads(layout.keys_json.read_text())
    document["keys"][0]["later"] = document["later"] = 1
    layout.keys_json.write_text(json.dumps(document))
    assert [key.name for key in store.list()] == ["ann"]


def test_a_key_that_the_edge_did_not_take_was_not_made(layout: Layout, late_edge: LateEdge) -> None:
    store = KeyStore(layout)
    with pytest.raises(EdgeError, match="'bob' was not made"):
        store.create("bob", "user")
    assert store.list() == ()
    late_edge.late = False
    store.create("bob", "user")
    assert list(late_edge.map.values()) == ["user:bob"]


def test_a_key_is_made_whatever_a_revoked_one_still_has_in_flight(layout: Layout, late_edge: LateEdge) -> None:
    """An edge from before an upgrade has no such table."""
    store = KeyStore(layout)
    late_edge.late = False
    late_edge.held = "No such table\n"
    store.create("bob", "user")
    with pytest.raises(EdgeError, match="'bob' may still be in use: the edge cannot say"):
        store.revoke("bob")
    assert late_edge.map == {}
    store.create("bob", "user")
    store.keep_cli_key()
    assert sorted(late_edge.map.values()) == [f"admin:{CLI_KEY_NAME}", "user:bob"]
    assert [(key.name, key.revoked) for key in store.list()] == [("bob", True), ("bob", False), (CLI_KEY_NAME, False)]


def test_the_supervisors_look_makes_the_edge_equal_to_the_store(layout: Layout, late_edge: LateEdge) -> None:
    store = KeyStore(layout)
    late_edge.late = False
    store.create("ann", "user")
    right = dict(late_edge.map)
    late_edge.map = {"A" * 64: "admin:stranger"}
    layout.keys_map.write_text("")
    store.keep_in_force()
    assert late_edge.map == right
    assert layout.keys_map.read_text().endswith(" user:ann\n")


def test_the_supervisors_look_waits_for_nobody_and_does_not_take_a_lost_store_for_an_empty_one(
    layout: Layout, late_edge: LateEdge
) -> None:
    store = KeyStore(layout)
    late_edge.late = False
    store.create("ann", "user")
    right, late_edge.map = dict(late_edge.map), {}
    with somebody_changes_keys(layout):
        store.keep_in_force()
    assert late_edge.map == {}
    late_edge.map = dict(right)
    layout.keys_json.unlink()
    with pytest.raises(ServiceError, match="missing"):
        store.keep_in_force()
    assert late_edge.map == right


@contextmanager
def somebody_changes_keys(layout: Layout) -> Iterator[None]:
    with layout.keys_json.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_batch_key_is_batch_in_both_files_and_comes_back_from_the_map(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user", "batch")
    store.create("bob", "user")
    assert [line.split()[1] for line in layout.keys_map.read_text().splitlines()].count("user:ann:batch") == 1
    layout.keys_json.write_text("no JSON")
    store.recover()
    assert {(key.name, key.role, key.priority) for key in store.list()} == {
        ("ann", "user", "batch"),
        ("bob", "user", "interactive"),
    }
    with pytest.raises(InvalidRequest, match="interactive, batch"):
        store.create("eve", "user", "urgent")  # type: ignore[arg-type]


def test_a_key_of_an_earlier_version_is_interactive(layout: Layout) -> None:
    store = KeyStore(layout)
    store.create("ann", "user")
    written = json.loads(layout.keys_json.read_text())
    del written["keys"][0]["priority"]
    layout.keys_json.write_text(json.dumps(written))
    assert [key.priority for key in store.list()] == ["interactive"]
