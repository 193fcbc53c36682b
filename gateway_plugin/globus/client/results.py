"""The answers of a task group, fetched by anyone of its owner's processes that has the group's id."""

from __future__ import annotations

from concurrent.futures import wait as wait_for
from typing import Any

from gateway_plugin.api_types import reading, understood
from gateway_plugin.channel import progress_bar
from gateway_plugin.errors import GatewayError, TaskFailed
from gateway_plugin.globus.client.protocol import in_order
from gateway_plugin.globus.client.transport import Transport


def resumed(transport: Transport, group: str, timeout_s: float, progress: bool | None) -> list[Any]:
    """As ``Client.resume``."""
    tasks = transport.tasks(group)
    with progress_bar(f"tasks of {group[:8]}", len(tasks), progress) as advance:
        for task in tasks:
            task.add_done_callback(lambda _: advance())
        done = wait_for(tasks, timeout=timeout_s).done
    transport.release(group)
    ended = [task for task in tasks if task in done and not task.cancelled()]
    found = in_order(task.result() for task in ended if not task.exception())
    missing = TaskFailed(
        "There is no answer to this prompt: it was not sent, its task failed or is still under way, or the result "
        "is no longer kept. Send it again."
    )
    if tasks and not found:
        reasons = [transport.failure(error).error for task in ended if (error := task.exception())]
        raise reasons[0] if reasons else missing
    return [
        missing if answer is None else answer if isinstance(answer, GatewayError) else understood(reading, answer)
        for answer in found
    ]
