"""How many connections the edge may hold, so that it never runs out of open files while it answers. Pure.

HAProxy stops accepting at *all* doors once the process is full: then requests that wait at the front door can never be
answered, because their answers come in by the inner door. So every door has its own limit, and the sum fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway_plugin.errors import ServiceError

_BESIDE = 256
"""Open files for everything else: HAProxy's own, its logs, its socket, and requests that are being refused."""
_IDLE_SHARE = 32
"""1/32 of the files for idle connections to engines that are kept for reuse."""
_FILES_MAX = 32768
"""More is used only if the site's waiters need it: connections cost memory too."""
_PASSING = 64
"""Requests at an internal door that are being refused."""
_PER_COLD = 5
"""Open files of a cold request beside its caller's connection: both ends at the cold door, the ingress, and, once it
is answered, the inner door's end and the engine."""
_COLD_SHARE = 12
"""At most one cold request per this number of files."""
_COLD_MIN, _OWNER_MIN, _CALLERS_MIN = 16, 12, 100
_LEAST = 320
"""Beside the reserved files, about this many are needed for these two."""


@dataclass(frozen=True)
class Places:
    """Connections and requests that the edge holds at a time; more have to wait, or are refused at once."""

    files: int
    """Open files that the sum below was made for."""
    callers: int
    """Connections at the front door, idle ones included. One file each."""
    owner: int
    """Connections at the owner's door. One file each."""
    busy: int
    """Requests in flight of callers with a key, without the cold ones. One file more each. Never fewer than ``cold``,
    because the edge's rules depend on it."""
    cold: int
    """Requests at the ingress: those that wait for a model, and cold ones that are being answered."""

    @property
    def inside(self) -> int:
        """Connections at the cold door, at the inner door, and at the around door."""
        return self.cold + _PASSING

    def of_one_key(self, wanted: int) -> int:
        """Requests in flight of one key, if the site allows ``wanted``: none can take all of ``cold``."""
        return min(wanted, max(1, self.cold // 2))

    @property
    def of_one_model(self) -> int:
        """Part of ``busy``: requests in flight at one model's engines, so that others have places."""
        return self.busy - self.busy // 4

    @property
    def connections(self) -> int:
        """Connections at all doors together."""
        return self.callers + self.owner + 3 * self.inside

    @property
    def per_source(self) -> int:
        """Connections of one address at the front door, except this machine's own, shared by its users."""
        return self.callers // 2

    @property
    def refused(self) -> int:
        """Connections at the front door of refused callers that are still sending and being read."""
        return self.callers // 4


def places(hard_limit: int, relayed: int, slots: int = 64, servers_per_slot: int = 8) -> Places:
    """Divide ``hard_limit`` open files. ``relayed``: requests that the ingress may have at a time.

    The sum, in open files::

        reserved (256), a check for each server, 1/32 kept connections to engines
      + 5 x cold      cold: ``relayed``, at most a twelfth of the files
      + busy          a sixth of the rest
      + owner         a thirty-second of the rest after that, 12 at least
      + callers       the rest
      = hard_limit    or less: see ``_FILES_MAX``

    Raises:
        ServiceError: fewer than 100 callers, or 16 cold requests, would fit.
    """
    beside = _BESIDE + slots * servers_per_slot
    enough = beside + _COLD_SHARE * relayed
    enough += enough // (_IDLE_SHARE - 1) + 1
    files = min(hard_limit, max(_FILES_MAX, enough))
    there = files - beside - files // _IDLE_SHARE
    cold = min(relayed, there // _COLD_SHARE)
    left = there - _PER_COLD * cold
    busy = left // 6
    owner = max(_OWNER_MIN, (left - busy) // 32)
    callers = left - busy - owner
    if cold < min(_COLD_MIN, relayed) or callers < _CALLERS_MIN:
        raise ServiceError(
            f"The limit of {hard_limit} open files is too low for the edge: raise it (ulimit -Hn) to "
            f"{beside + _LEAST} at least, better to {enough}."
        )
    return Places(files, callers, owner, busy, cold)
