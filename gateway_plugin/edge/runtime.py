"""Routes at run time, over the edge's socket: no reload, so no old process with streams that nobody counts.

Every change is followed by the map files and ``servers.state`` on disk, so that an edge that was killed comes up with
the routes it had, whoever else is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from gateway_plugin.edge.commands import (
    ServerStat,
    kept_state,
    map_changes,
    map_text,
    model_name,
    open_commands,
    parse_map,
    parse_servers,
    refused,
    server_name,
    show_servers,
)
from gateway_plugin.edge.front import APART
from gateway_plugin.errors import EdgeError
from gateway_plugin.layout import Layout, write_private

__all__ = ["EdgeError", "EdgeRuntime", "ServerStat"]

_TIMEOUT_S = 5.0


class EdgeRuntime:
    """The edge of one gateway. Reads may run side by side; changes are made one after the other."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._changing = asyncio.Lock()

    async def open(self, slot: int, server: int, address: str) -> None:
        """Let ``server`` of ``slot`` take requests for the engine at ``address`` (``IP:PORT``).

        Also takes a drain back; what is in flight goes on. Raises ``EdgeError`` if the edge refused.
        """
        async with self._changing:
            await self._change(open_commands(slot, server, address))
            await self._save_servers()

    async def drain(self, slot: int, server: int) -> None:
        """No new request for this server; what is in flight goes on."""
        async with self._changing:
            await self._change((f"set server {server_name(slot, server)} state drain",))
            await self._save_servers()

    async def close(self, slot: int, server: int) -> None:
        """Take the server out of use (``maint``). Streams still on it are not cut."""
        async with self._changing:
            await self._change((f"set server {server_name(slot, server)} state maint",))
            await self._save_servers()

    async def servers(self, slots: Iterable[int] | None = None) -> tuple[ServerStat, ...]:
        """Servers in use, of some slots (0.2 ms each) or of all; those in ``maint`` are left out."""
        wanted = None if slots is None else tuple(slots)
        if wanted == ():
            return ()
        return parse_servers(await self._ask(show_servers(wanted)))

    async def sync_slots(self, names: Mapping[str, int], fresh: Iterable[int], apart: Container[str] = ()) -> None:
        """These names, and no others, lead to these slots; slots in ``fresh``, and those without, get a new engine key.

        Names in ``apart`` lead there from the inner door alone: the front door hands their requests to the ingress.

        Written to disk first: an edge that starts meanwhile starts right. Raises ``EdgeError`` if the edge refused.
        """
        slots = {model_name(name): server_name(slot, 0).partition("/")[0] for name, slot in names.items()}
        wanted = {name: slot + (APART if name in apart else "") for name, slot in slots.items()}
        new = {f"slot{slot:d}" for slot in fresh}
        async with self._changing:
            keys = _read_map(self._layout.slot_keys_map)
            renewed = {slot: secrets.token_urlsafe(32) for slot in new | (set(slots.values()) - set(keys))}
            keys |= renewed
            # Keys first: a name must never lead to a slot whose engines have another key than the edge sends.
            await asyncio.to_thread(write_private, self._layout.slot_keys_map, map_text(keys))
            await asyncio.to_thread(write_private, self._layout.models_map, map_text(wanted))
            await self._sync_map(self._layout.slot_keys_map, keys)
            await self._sync_map(self._layout.models_map, wanted)

    def slot_key(self, slot: int) -> str:
        """The key of the engines in ``slot``, for their environment. Raises ``EdgeError`` if it never had a tenant."""
        try:
            return _read_map(self._layout.slot_keys_map)[f"slot{slot:d}"]
        except KeyError:
            raise EdgeError(f"Slot {slot} has no engine key: sync_slots was never called for it.") from None

    async def tenants(self) -> dict[str, int]:
        """Name or alias -> slot, as the running edge has it."""
        found = await self._running_map(self._layout.models_map)
        return {name: int(slot.removeprefix("slot").removesuffix(APART)) for name, slot in found.items()}

    async def apart(self) -> frozenset[str]:
        """Names whose requests the front door hands to the ingress though their slot has engines."""
        found = await self._running_map(self._layout.models_map)
        return frozenset(name for name, slot in found.items() if slot.endswith(APART))

    # --- the socket ---

    async def _sync_map(self, path: Path, want: Mapping[str, str]) -> None:
        await self._change(map_changes(path, await self._running_map(path), want))

    async def _running_map(self, path: Path) -> dict[str, str]:
        return parse_map(await self._ask(f"show map {path}"), numbered=True)

    async def _change(self, commands: tuple[str, ...]) -> None:
        if not commands:
            return
        reason = refused(await self._ask(";".join(commands)))
        if reason is not None:
            raise EdgeError(f"The edge refused a change of routes: {reason}")

    async def _save_servers(self) -> None:
        state = kept_state(await self._ask("show servers state"))
        await asyncio.to_thread(write_private, self._layout.servers_state, state)

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
            raise EdgeError(f"The edge does not answer on {path}: {error or 'no answer in time'}.") from error


def _read_map(path: Path) -> dict[str, str]:
    try:
        return parse_map(path.read_text(), numbered=False)
    except FileNotFoundError:
        return {}
