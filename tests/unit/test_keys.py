"""API keys without an edge: what is kept, what is not."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway_plugin.errors import InvalidRequest, NotFound, ServiceError
from gateway_plugin.keys import CLI_KEY_NAME, KeyStore
from gateway_plugin.layout import Layout


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
    with pytest.raises(ServiceError, match="damaged"):
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
