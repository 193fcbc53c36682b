"""How many bytes of requests' bodies the ingress holds: of one key, and in total."""

from __future__ import annotations

from collections import Counter

from gateway_plugin.errors import RateLimited, Unavailable

TAG = "x-gateway-tag"
"""The edge's tag of a key, which tells keys apart and does not contain the key's name."""


class Budget:
    """Bytes held at a time. Used only on the ingress's loop."""

    def __init__(self, in_all: int, per_key: int) -> None:
        self._in_all = in_all
        self._per_key = per_key
        self._held: Counter[str] = Counter()
        self.held = 0
        """Bytes of all keys."""

    def hold(self, tag: str) -> Hold:
        """Begin to hold a body of the key with this tag."""
        return Hold(self, tag)

    def take(self, tag: str, count: int) -> None:
        """Raises ``RateLimited`` for a key that holds too much, ``Unavailable`` if all of them together do."""
        if self._held[tag] + count > self._per_key:
            raise RateLimited(
                f"The bodies of this key's requests that wait for models are over {self._per_key} bytes together, its "
                "limit. Send fewer at a time.",
                retry_after_s=5,
            )
        if self.held + count > self._in_all:
            raise Unavailable(
                f"The bodies of requests that wait for models are over {self._in_all} bytes together, the gateway's "
                "limit. Try again.",
                retry_after_s=5,
                state="overloaded",
            )
        self._held[tag] += count
        self.held += count

    def give_back(self, tag: str, count: int) -> None:
        """Return what was taken."""
        self._held[tag] -= count
        self.held -= count
        if not self._held[tag]:
            del self._held[tag]


class Hold:
    """One body's share of the budget."""

    def __init__(self, budget: Budget, tag: str) -> None:
        self._budget = budget
        self._tag = tag
        self._count = 0

    def more(self, count: int) -> None:
        """Hold ``size`` more bytes. Raises what ``Budget.take`` raises."""
        self._budget.take(self._tag, count)
        self._count += count

    def end(self) -> None:
        """Release the body; idempotent."""
        self._budget.give_back(self._tag, self._count)
        self._count = 0
