"""API keys: made, listed, revoked. Only their SHA-256 is kept.

``keys.json`` is the store; ``keys.map`` is the same for the edge, which looks up the hash of what a caller sends. A
running edge is told over its socket, so that a revoked key stops working at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from gateway_plugin.edge.commands import add_to_map, ask, delete_from_map, map_text, refused
from gateway_plugin.errors import EdgeError, InvalidRequest, NotFound, ServiceError
from gateway_plugin.layout import Layout, private_folder, write_private

Role = Literal["user", "endpoint", "admin"]
"""``endpoint``: a user whose word for whom it asks (``x-gateway-caller``) goes into the usage log."""

KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""What a key may be called: it goes into headers, maps and the usage log."""

CLI_KEY_NAME = "admin-cli"
"""The command line's own admin key, in the clear in ``admin.key``. Never without one: it is how keys are made."""


@dataclass(frozen=True)
class Key:
    """One key without its secret."""

    name: str
    role: Role
    sha256: str
    """Hexadecimal, lower case."""
    created: float
    """Seconds since 1970."""


class KeyStore:
    """The keys of one gateway."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def create(self, name: str, role: Role) -> str:
        """A new key; its secret is returned and cannot be read again.

        Raises:
            InvalidRequest: the name or role is not possible, or the name is taken.
            EdgeError: the edge runs and did not take it.
        """
        if not KEY_NAME.fullmatch(name):
            raise InvalidRequest(f"A key's name matches {KEY_NAME.pattern}, got {name!r}.")
        if role not in get_args(Role):
            raise InvalidRequest(f"A key's role is one of {', '.join(get_args(Role))}, got {role!r}.")
        secret, key = _made(name, role)
        with self._locked():
            keys = self.list()
            if any(other.name == name for other in keys):
                raise InvalidRequest(f"There is a key called '{name}' already; revoke it first or choose another name.")
            self._write((*keys, key))
            self._tell(add_to_map(self._layout.keys_map, _hash(key), _value(key)))
        return secret

    def list(self) -> tuple[Key, ...]:
        """All keys, oldest first. Raises ``ServiceError`` if the file is damaged."""
        path = self._layout.keys_json
        try:
            return tuple(Key(**entry) for entry in json.loads(path.read_text())["keys"])
        except FileNotFoundError:
            return ()
        except (ValueError, TypeError, KeyError) as error:
            raise ServiceError(f"{path} is damaged ({error}); restore it, or remove it and make new keys.") from error

    def revoke(self, name: str) -> None:
        """Forget a key: it is refused from now on. That of the command line is replaced by a new one at once.

        Raises:
            NotFound: there is no such key.
            EdgeError: the running edge refused.
        """
        with self._locked():
            keys = self.list()
            gone = next((key for key in keys if key.name == name), None)
            if gone is None:
                raise NotFound(f"There is no key called '{name}'; 'gateway keys list' shows those there are.")
            if name == CLI_KEY_NAME:
                self._renew_cli_key(keys)
                return
            self._write(tuple(key for key in keys if key is not gone))
            self._tell(delete_from_map(self._layout.keys_map, _hash(gone)))

    def keep_cli_key(self) -> None:
        """See to it that ``admin.key`` holds a key that the store knows as an administrator's; else make it anew.

        Raises:
            ServiceError: the store is damaged.
            EdgeError: the running edge refused.
        """
        with self._locked():
            keys = self.list()
            try:
                held = self._layout.admin_key.read_text(encoding="utf-8").strip()
            except (FileNotFoundError, UnicodeDecodeError):
                held = ""
            if not any(key.sha256 == _digest(held) and key.role == "admin" for key in keys):
                self._renew_cli_key(keys)

    def _renew_cli_key(self, keys: tuple[Key, ...]) -> None:
        """The new one is in force, and in ``admin.key``, before the edge forgets the old one."""
        secret, key = _made(CLI_KEY_NAME, "admin")
        self._write((*(other for other in keys if other.name != CLI_KEY_NAME), key))
        write_private(self._layout.admin_key, secret)
        self._tell(add_to_map(self._layout.keys_map, _hash(key), _value(key)))
        for gone in keys:
            if gone.name == CLI_KEY_NAME:
                self._tell(delete_from_map(self._layout.keys_map, _hash(gone)))

    def write_map(self) -> None:
        """Make ``keys.map`` equal to ``keys.json``: before the edge starts."""
        with self._locked():
            self._write_map(self.list())

    def _write(self, keys: tuple[Key, ...]) -> None:
        document = {"keys": [asdict(key) for key in keys]}
        write_private(self._layout.keys_json, json.dumps(document, indent=1) + "\n")
        self._write_map(keys)

    def _write_map(self, keys: tuple[Key, ...]) -> None:
        private_folder(self._layout.edge)
        write_private(self._layout.keys_map, map_text({_hash(key): _value(key) for key in keys}))

    def _tell(self, command: str) -> None:
        """Over the socket. An edge that does not run reads ``keys.map`` when it starts, so silence is fine there."""
        try:
            reason = refused(ask(self._layout.edge_socket, command))
        except EdgeError as error:
            if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                return
            raise
        if reason is not None:
            raise EdgeError(
                f"The running edge did not take the change of keys: {reason}. 'gateway down' and 'up' does."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two ``gateway keys`` at a time write one after the other."""
        private_folder(self._layout.state)
        path = self._layout.keys_json.with_suffix(".lock")
        with path.open("a") as lock:
            path.chmod(0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _made(name: str, role: Role) -> tuple[str, Key]:
    secret = "gw-" + secrets.token_urlsafe(32)
    return secret, Key(name, role, _digest(secret), time.time())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _hash(key: Key) -> str:
    """As the edge's ``sha2(256),hex`` prints it."""
    return key.sha256.upper()


def _value(key: Key) -> str:
    return f"{key.role}:{key.name}"
