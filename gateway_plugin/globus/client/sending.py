"""From verbs to prompts on their way: task groups, lanes, sizes, deadlines, and the thread that sends."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from gateway_plugin.errors import EndpointUnavailable, InvalidRequest, PromptTooLarge
from gateway_plugin.globus.client.batcher import Dispatcher
from gateway_plugin.globus.client.batches import Limits, Pace, size
from gateway_plugin.globus.client.exit import close_at_exit
from gateway_plugin.globus.client.lanes import Call, File, LaneKey
from gateway_plugin.globus.client.protocol import GROUP_PROMPTS
from gateway_plugin.globus.client.transport import Transport

LONGEST_TIMEOUT_S = 6 * 3600.0
"""What the site's function takes."""
SUBMISSION_BYTES = 9_500_000
"""Of one prompt as it travels; Globus Compute takes 10 MB, its own envelope included."""

Read = Callable[[dict[str, Any]], Any]
"""What the caller wants of an answer's body."""


class Sender:
    """A dispatcher on a thread of its own, and the lanes of one client. Thread-safe."""

    def __init__(
        self, transport: Transport, limits: Limits | None, pace: Pace | None, group: str | None = None
    ) -> None:
        self.group = _group(group)
        """Task group of single prompts."""
        self._maps: set[str] = set()
        """Task groups of the maps under way."""
        self._last_ms = 0
        self.dispatcher = Dispatcher(transport, limits=limits, pace=pace)
        self._lanes: dict[tuple[str, bool, float], LaneKey] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self.dispatcher.run, name="globus-client", daemon=True).start()
        close_at_exit(self.dispatcher)

    def one(self, item: Mapping[str, Any], model: str, read: Read, wait: bool, timeout_s: float) -> Future[Any]:
        """Send one prompt, with others like it. Raises ``GatewayError`` where it cannot be sent."""
        call = _call(item, read, timeout_s)
        kind = (model, wait, timeout_s)
        with self._lock:
            self._check_open()
            if kind not in self._lanes:
                self._lanes[kind] = LaneKey(self.group, self._lane_name(), *kind)
            self.dispatcher.offer(self._lanes[kind], [call])
        return call.future

    def many(
        self,
        items: Sequence[Mapping[str, Any]],
        model: str,
        read: Read,
        wait: bool,
        timeout_s: float,
        file: File | None = None,
        group: str | None = None,
    ) -> tuple[str, list[Future[Any]]]:
        """Send these, by themselves: their task group and their futures. ``file``: the items are lines of it.

        The group is theirs until it is released: another map of this client may not have it meanwhile.
        """
        if len(items) > GROUP_PROMPTS:
            raise InvalidRequest(f"A map takes at most {GROUP_PROMPTS:,} prompts, got {len(items):,}: make several.")
        calls = [_call(item, read, timeout_s) for item in items]
        with self._lock:
            self._check_open()
            found = _group(group)
            if found == self.group or found in self._maps:
                raise InvalidRequest(f"task_group_id: {found} is in use by this client; take another for this map.")
            self._maps.add(found)
            lane = LaneKey(found, self._lane_name(), model, wait, timeout_s, file, len(items))
            self.dispatcher.offer(lane, calls)
        return found, [call.future for call in calls]

    def release(self, group: str) -> None:
        """Send nothing more of a map's ``group``, and expect nothing more of it."""
        self.dispatcher.release(group)
        with self._lock:
            self._maps.discard(group)

    def _lane_name(self) -> str:
        """By when it begins: ``resume`` gives a group's lanes in that order, whichever process began them."""
        self._last_ms = max(int(time.time() * 1000), self._last_ms + 1)
        return f"{self._last_ms:011x}{uuid.uuid4().hex[:5]}"

    def _check_open(self) -> None:
        if self.dispatcher.stopped:
            raise EndpointUnavailable("This client is closed.")


def _group(given: str | None) -> str:
    try:
        return str(uuid.uuid4() if given is None else uuid.UUID(given))
    except (ValueError, AttributeError, TypeError):
        raise InvalidRequest(
            f"task_group_id: expected a UUID, as uuid.uuid4() gives and not used for anything else, got {given!r}"
        ) from None


def _call(item: Mapping[str, Any], read: Any, timeout_s: float) -> Call:
    now = time.monotonic()
    try:
        found = size(item, now)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"Prompts and options travel as JSON, which these are not: {error}.") from None
    if found.request_bytes > SUBMISSION_BYTES:
        raise PromptTooLarge(
            f"The prompt takes {found.request_bytes:,} bytes, Globus Compute {SUBMISSION_BYTES:,} a submission. Put it "
            "into a file at the site and use map_file()."
        )
    return Call(item, found, now + timeout_s, read)


def checked_timeout(timeout_s: float) -> float:
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s: expected more than 0 and at most {LONGEST_TIMEOUT_S:.0f} s, got {timeout_s!r}"
        )
    return float(timeout_s)
