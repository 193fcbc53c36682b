"""Routes at run time, over the edge's socket: no reload, which would leave an old process with uncounted streams.

After every change the map files and ``servers.state`` are written, so that a killed edge restarts with its routes
without any other part. A change is valid even if its copy cannot be written: the copy follows when there is room
(``Copies.retry``).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from gateway_plugin.edge.frontends import APART
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
    release_command,
    server_name,
    show_servers,
)
from gateway_plugin.errors import EdgeAway, EdgeError
from gateway_plugin.files import Copies
from gateway_plugin.paths import Layout

__all__ = ["EdgeError", "EdgeRuntime", "ServerStat"]

_TIMEOUT_S = 5.0


class EdgeRuntime:
    """The edge of one gateway. Changes of one slot are serialised over all callers."""

    def __init__(self, layout: Layout, copies: Copies | None = None) -> None:
        self._layout = layout
        self._copies = copies or Copies()
        self._syncing = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._keys: dict[str, str] | None = None
        """Slot -> key that the edge should have; ``None``: not read yet."""

    async def open(self, slot: int, server: int, address: str, limit: int = 0) -> None:
        """Let ``server`` of ``slot`` take requests for the engine at ``address`` (``IP:PORT``), ``limit`` at a time.

        Also cancels a drain; requests in flight continue. Raises ``EdgeAway`` if the edge does not answer,
        ``EdgeError`` if it refused.
        """
        await self._change(open_commands(slot, server, address, limit))
        await self._save_servers()

    async def limit(self, slot: int, server: int, limit: int) -> None:
        """Send this server so many requests at a time (0: no limit)."""
        await self._change(limit_commands(slot, server, limit))

    async def release(self, slot: int) -> None:
        """Let the ingress take what waits for the slot's engines, if none of them takes requests."""
        await self._change((release_command(slot),))

    async def drain(self, slot: int, server: int) -> None:
        """Drain this server: no new request; requests in flight continue. What waits goes to the slot's other engines,
        or, if it was the last, to the ingress."""
        await self._change(leave_commands(slot, server, "drain"))
        await self._save_servers()

    async def close(self, slot: int, server: int) -> None:
        """Take the server out of use (``maint``). Streams on it are not cut."""
        await self._change(leave_commands(slot, server, "maint"))
        await self._save_servers()

    async def servers(self, slots: Iterable[int] | None = None) -> tuple[ServerStat, ...]:
        """Servers in use, of some slots (0.2 ms each) or of all; those in ``maint`` are left out."""
        wanted = None if slots is None else tuple(slots)
        if wanted == ():
            return ()
        return parse_servers(await self._ask(show_servers(wanted)))

    async def adopt_keys(self) -> None:
        """Load the engine keys from the running edge, or from disk. Raises ``EdgeAway``."""
        running = await self._running_map(self._layout.slot_keys_map)
        self._keys = {**_read_map(self._layout.slot_keys_map), **running}

    def renew_keys(self, fresh: Iterable[int]) -> None:
        """Give slots new engine keys. ``slot_key`` returns them at once; ``sync_slots`` sets them in the edge."""
        self._keys = {**self._known_keys(), **{_slot(slot): secrets.token_urlsafe(32) for slot in fresh}}

    async def sync_slots(self, names: Mapping[str, int], fresh: Iterable[int], apart: Container[str] = ()) -> None:
        """Route these names, and no others, to these slots; slots in ``fresh`` or without a key get a new one.

        Names in ``apart`` lead there from the inner door alone: the front door passes their requests to the ingress.

        Written to disk first, where possible: an edge that starts meanwhile starts with the right routes. Raises
        ``EdgeAway`` if the edge does not answer, ``EdgeError`` if it refused.
        """
        wanted = {model_name(name): _slot(slot) + (APART if name in apart else "") for name, slot in names.items()}
        async with self._syncing:
            known = self._known_keys()
            self.renew_keys({*fresh, *(slot for slot in names.values() if _slot(slot) not in known)})
            keys = self._known_keys()
            # Keys first: a name must never lead to a slot whose engines have another key than the edge sends.
            await asyncio.to_thread(self._copies.keep, self._layout.slot_keys_map, map_text(keys))
            await asyncio.to_thread(self._copies.keep, self._layout.models_map, map_text(wanted))
            await self._sync_map(self._layout.slot_keys_map, keys)
            await self._sync_map(self._layout.models_map, wanted)

    def slot_key(self, slot: int) -> str:
        """Key of the engines in ``slot``, for their environment. Raises ``EdgeError`` if it never had one."""
        try:
            return self._known_keys()[_slot(slot)]
        except KeyError:
            raise EdgeError(f"Slot {slot} has no engine key: sync_slots was never called for it.") from None

    async def keys_in_force(self) -> bool:
        """Whether the running edge has the engine keys that ``slot_key`` returns."""
        return await self._running_map(self._layout.slot_keys_map) == self._known_keys()

    async def tenants(self) -> dict[str, int]:
        """Name or alias -> slot, as in the running edge."""
        found = await self._running_map(self._layout.models_map)
        return {name: int(slot.removeprefix("slot").removesuffix(APART)) for name, slot in found.items()}

    async def apart(self) -> frozenset[str]:
        """Names whose requests the front door passes to the ingress although their slot has engines."""
        found = await self._running_map(self._layout.models_map)
        return frozenset(name for name, slot in found.items() if slot.endswith(APART))

    def _known_keys(self) -> dict[str, str]:
        return self._keys if self._keys is not None else _read_map(self._layout.slot_keys_map)

    # --- the socket ---

    async def _sync_map(self, path: Path, want: Mapping[str, str]) -> None:
        await self._change(map_changes(path, await self._running_map(path), want))

    async def _running_map(self, path: Path) -> dict[str, str]:
        return parse_map(await self._ask(f"show map {path}"), numbered=True)

    async def _change(self, commands: tuple[str, ...]) -> None:
        if not commands:
            return
        if (reason := refused(await self._ask(";".join(commands)))) is not None:
            raise EdgeError(f"The edge refused a change of routes: {reason}")

    async def _save_servers(self) -> None:
        async with self._saving:  # an older state must not overwrite a newer one
            state = kept_state(await self._ask("show servers state"))
            await asyncio.to_thread(self._copies.keep, self._layout.servers_state, state)

    async def _ask(self, command: str) -> str:
        """One connection, one line, the whole answer."""
        path = self._layout.edge_socket
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path)
                try:
                    writer.write(command.encode() + b"\n")
                    await writer.drain()
                    return (await reader.read()).decode(errors="replace")
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, TimeoutError) as error:
            raise EdgeAway(f"The edge does not answer on {path}: {error or 'no answer in time'}.") from error


def _slot(slot: int) -> str:
    return server_name(slot, 0).partition("/")[0]


def _read_map(path: Path) -> dict[str, str]:
    try:
        return parse_map(path.read_text(errors="replace"), numbered=False)
    except OSError:
        return {}
