"""API keys: made, listed, revoked. Only their SHA-256 is stored.

``keys.json`` is the store; ``keys.map`` is its copy for the edge, which looks up the hash of a caller's key. A running
edge is changed over its socket, and its answer counts: a key is made when the edge admits it and the store has it; it
is revoked when the edge no longer admits it and has no request of it in flight. Until then the store keeps it as
revoked, and the supervisor retries.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import get_args

from gateway_plugin.edge.admission import StillHeld, admit_only
from gateway_plugin.edge.key import KEY_NAME, Key, Keys, PriorityClass, Role, admitted, from_map, map_digest
from gateway_plugin.edge.socket_protocol import ask, map_text, parse_map
from gateway_plugin.errors import EdgeError, InvalidRequest, NotFound, ServiceError
from gateway_plugin.files import Garbled, text_in, write_private
from gateway_plugin.ownership import demand_own
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.service.discovery import edges_of
from gateway_plugin.service_state import record_here
from gateway_plugin.state_file import StateFile

_PATIENCE_S = 5.0
"""Wait for an edge that starts, and for the end of a revoked key's requests in flight."""
_PAUSE_S = 0.1

CLI_KEY_NAME = "admin-cli"
"""The command line's own admin key, in plain text in ``admin.key``. Always present: other keys are made with it."""


class KeysGarbled(ServiceError):
    """The store exists and cannot be parsed."""


class KeyStore:
    """The keys of one gateway."""

    def __init__(self, layout: Layout) -> None:
        """Raises ``ServiceError`` if the state folder could be another user's."""
        demand_own(layout.state)
        self._layout = layout
        self._file = StateFile(layout.keys_json, Keys)

    def create(self, name: str, role: Role, priority: PriorityClass = "interactive") -> str:
        """Make a key; its secret is returned and cannot be read again.

        Raises:
            InvalidRequest: the name, role or priority is invalid, or the name is taken.
            ServiceError: the gateway runs elsewhere, or the store is lost or cannot be written; the key was not made.
            EdgeError: the edge runs and did not take it; the key was not made.
        """
        if not KEY_NAME.fullmatch(name):
            raise InvalidRequest(f"A key's name matches {KEY_NAME.pattern}, got {name!r}.")
        if role not in get_args(Role):
            raise InvalidRequest(f"A key's role is one of {', '.join(get_args(Role))}, got {role!r}.")
        if priority not in get_args(PriorityClass):
            known = ", ".join(get_args(PriorityClass))
            raise InvalidRequest(f"A key's priority is one of {known}, got {priority!r}.")
        record_here(self._layout)
        secret, key = _made(name, role, priority)
        with self._locked():
            self._demand_store()
            keys = self.list()
            if any(other.name == name and not other.revoked for other in keys):
                raise InvalidRequest(f"There is a key called '{name}' already; revoke it first or choose another name.")
            # The edge first: a key that it has and the store lacks is removed later, even if this command fails.
            try:
                self._tell_edge((*keys, key), _PATIENCE_S, others_may_end=True)
            except EdgeError as error:
                raise EdgeError(f"The key '{name}' was not made: {error.message.rstrip('.')}. Try again.") from error
            try:
                self._write((*keys, key))
            except OSError as error:
                with contextlib.suppress(EdgeError):  # the supervisor repeats it every second
                    self._tell_edge(keys, 0.0, others_may_end=True)
                raise ServiceError(f"The key '{name}' was not made: {_unwritten(error)}, then try again.") from None
        return secret

    def list(self) -> tuple[Key, ...]:
        """All keys, oldest first. Raises ``ServiceError`` if the file is damaged."""
        return self._stored().keys

    def _stored(self) -> Keys:
        try:
            return self._file.read() or Keys(keys=())
        except Garbled as error:
            raise KeysGarbled(
                f"{error}. The running edge keeps the keys it has; 'gateway down' and 'up' take them over from its map."
            ) from error

    def recover(self) -> str:
        """Where the store cannot be parsed: set it aside and restore the keys from ``keys.map``, the edge's copy.

        Only while no edge runs. Returns a message about what was done; empty if nothing was.

        Raises:
            ServiceError: the copy has no keys either, or the store is missing although keys existed. Nothing changed: a
                gateway never starts without its earlier keys.
            OSError: the store cannot be written; nothing was changed.
        """
        path, copy = self._layout.keys_json, self._layout.keys_map
        with self._locked():
            self._demand_store()
            known = self._mapped()
            try:
                self.list()
            except KeysGarbled as error:
                try:
                    keys = tuple(from_map(digest, value, time.time()) for digest, value in known.items())
                except ValueError:
                    keys = ()
                if not keys:
                    raise ServiceError(
                        f"{error.message.partition('. ')[0]}, and {copy} names no keys, or other things too: "
                        "put the file back from a copy, or move both away and make new keys."
                    ) from None
                aside = self._file.replace_garbled(Keys(keys=keys))
                with contextlib.suppress(OSError):
                    self._write_map(keys)
                return f"{path} was garbled: it is {aside.name} now, and the keys are those of {copy.name}."
        return ""

    def _demand_store(self) -> None:
        """Raises ``ServiceError`` if the store is missing although keys existed: it is no new gateway."""
        path, copy = self._layout.keys_json, self._layout.keys_map
        traces = [*path.parent.glob(f"{path.name}.garbled*"), *([copy] if self._mapped() else ())]
        if traces and not path.exists():
            raise ServiceError(
                f"{path} is missing, and there were keys: put it back from a copy, or to begin with new keys move "
                f"away {', '.join(map(str, traces))}."
            )

    def _mapped(self) -> dict[str, str]:
        return parse_map(text_in(self._layout.keys_map) or "", numbered=False)

    def revoke(self, name: str) -> None:
        """Refuse a key from now on, and cut its requests in flight. The command line's own is replaced.

        Raises:
            NotFound: there is no such key.
            ServiceError: the gateway runs on another machine, or the store cannot be written: nothing was changed.
            EdgeError: the running edge did not confirm it. The supervisor retries every second; so does a further call.
        """
        record_here(self._layout)
        with self._locked():
            keys = self.list()
            if not any(key.name == name for key in keys):
                raise NotFound(f"There is no key called '{name}'; 'gateway keys list' shows those there are.")
            try:
                if name == CLI_KEY_NAME:
                    self._renew_cli_key(keys)
                else:
                    self._write(tuple(_revoked(key, name) for key in keys))
                    self._put_in_force(_PATIENCE_S)
            except OSError as error:
                raise ServiceError(f"The key '{name}' was not revoked: {_unwritten(error)}, then try again.") from None
            except EdgeError as error:
                raise EdgeError(
                    f"The key '{name}' may still be in use: {error.message.rstrip('.')}. An edge that starts refuses "
                    "it, and the change is sent to the running one every second; until it confirms, 'gateway keys "
                    "list' shows the key as revoked, not confirmed. 'gateway down' ends all."
                ) from error

    def keep_cli_key(self) -> None:
        """Ensure that ``admin.key`` holds an administrator's key of the store; otherwise make a new one.

        Raises:
            ServiceError: the store is damaged.
            EdgeError: the running edge refused.
        """
        with self._locked():
            keys = self.list()
            held = (text_in(self._layout.admin_key) or "").strip()
            if not any(key.sha256 == _digest(held) and key.role == "admin" and not key.revoked for key in keys):
                self._renew_cli_key(keys, others_may_end=True)

    def _renew_cli_key(self, keys: tuple[Key, ...], *, others_may_end: bool = False) -> None:
        """The new key is in ``admin.key`` before the edge drops the old one."""
        secret, key = _made(CLI_KEY_NAME, "admin")
        fresh = self._layout.admin_key.with_suffix(".new")
        write_private(fresh, secret)  # the store and this file change together, or not at all on a full disk
        self._write((*(_revoked(old, CLI_KEY_NAME) for old in keys), key))
        fresh.replace(self._layout.admin_key)
        self._put_in_force(_PATIENCE_S, others_may_end=others_may_end)

    def write_map(self) -> None:
        """Make ``keys.map`` equal to ``keys.json``: before the edge starts."""
        with self._locked():
            self._write_map(self.list())

    def keep_in_force(self) -> None:
        """Make ``keys.map`` and the running edge equal to the store, and complete unfinished calls of ``revoke``.

        Does nothing while another command changes the keys: that command does this itself.

        Raises:
            ServiceError: the store is missing or damaged.
            EdgeError: an edge runs and does not confirm.
            OSError: ``keys.map`` cannot be written; the edge was updated.
        """
        with self._locked(wait=False) as alone:
            if not alone:
                return
            if not self._layout.keys_json.exists():
                raise ServiceError(f"{self._layout.keys_json} is missing; the running edge keeps the keys it has.")
            self._put_in_force(0.0)
            self._write_map(self.list())

    def _put_in_force(self, patience_s: float, *, others_may_end: bool = False) -> None:
        """Store -> ``keys.map`` -> running edge; then delete what was revoked.

        Args:
            patience_s: how long to wait for an edge that starts.
            others_may_end: requests in flight of keys revoked earlier are no failure; the next pass cuts them.
        """
        keys = self.list()
        # The copy on disk follows with ``keep_in_force`` at the latest; the edge's change must not wait for it.
        with contextlib.suppress(OSError):
            self._write_map(keys)  # first: an edge that starts meanwhile starts with the right keys
        if self._tell_edge(keys, patience_s, others_may_end=others_may_end) and any(key.revoked for key in keys):
            with contextlib.suppress(OSError):
                self._write(tuple(key for key in keys if not key.revoked))

    def _tell_edge(self, keys: tuple[Key, ...], patience_s: float, *, others_may_end: bool) -> bool:
        """Make a running edge admit these keys and no others; without one there is nothing to do.

        Returns whether no request of other keys is in flight. Arguments and errors as for ``_put_in_force``.
        """
        want, say = admitted(keys), partial(ask, self._layout.edge_socket)
        revoked = {map_digest(key) for key in keys if key.revoked}
        deadline = time.monotonic() + patience_s
        while True:
            try:
                admit_only(say, self._layout.keys_map, want, revoked, _PATIENCE_S)
                break
            except StillHeld:
                if not others_may_end:
                    raise
                return False
            except EdgeError as error:
                if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                    raise
                if not (edges := edges_of(self._layout)):
                    break
                if time.monotonic() >= deadline:
                    raise EdgeError(
                        f"an edge runs (PID {edges[0].pid}) and does not answer on {self._layout.edge_socket}: it "
                        "starts, or GATEWAY_RUN_ROOT is not what it was for 'gateway up'"
                    ) from error
            time.sleep(_PAUSE_S)
        return True

    def _write(self, keys: tuple[Key, ...]) -> None:
        """Write store and map. Raises ``OSError`` if the store cannot be written; the map is written at the latest a
        second after there is room (``keep_in_force``)."""
        self._file.write(self._stored().model_copy(update={"keys": keys}))
        with contextlib.suppress(OSError):
            self._write_map(keys)

    def _write_map(self, keys: tuple[Key, ...]) -> None:
        text = map_text(admitted(keys))
        private_folder(self._layout.edge)
        if text_in(self._layout.keys_map) != text:
            write_private(self._layout.keys_map, text)

    @contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Lock against other ``gateway keys`` commands. Yields whether the lock was acquired."""
        private_folder(self._layout.state)
        path = self._layout.keys_json.with_suffix(".lock")
        with path.open("a") as lock:
            path.chmod(0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _revoked(key: Key, name: str) -> Key:
    """``key``, revoked if it is the one called ``name``."""
    return key.model_copy(update={"revoked": True}) if key.name == name else key


def _made(name: str, role: Role, priority: PriorityClass = "interactive") -> tuple[str, Key]:
    secret = "gw-" + secrets.token_urlsafe(32)
    return secret, Key(name=name, role=role, sha256=_digest(secret), created=time.time(), priority=priority)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _unwritten(error: OSError) -> str:
    """Reason of a failed write, with the path: only the owner makes keys."""
    return f"{error.filename or 'the state folder'} cannot be written ({error.strerror or error}); make room there"
