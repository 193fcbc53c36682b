"""The answers of a task group: gathered while their client lives, or resumed by whoever has the group's id."""

from __future__ import annotations

import sys
from concurrent.futures import Future, as_completed
from concurrent.futures import wait as wait_for
from typing import Any

from gateway_plugin.errors import GatewayError, TaskFailed
from gateway_plugin.globus.client import payloads as bodies
from gateway_plugin.globus.client.endings import error_of, read
from gateway_plugin.globus.client.progress import progress_bar
from gateway_plugin.globus.client.protocol import in_order
from gateway_plugin.globus.client.transport import Transport


def gathered(
    group: str, futures: list[Future[Any]], return_errors: bool, progress: bool | None, words: str
) -> list[Any]:
    """The futures' answers, in order. The first error ends it, unless it may stand in an answer's place; Ctrl-C says
    how to go on.
    """
    try:
        with progress_bar(words, len(futures), progress) as advance:
            for future in as_completed(futures):
                advance()
                if not return_errors and (error := error_of(future)):
                    raise error
    except KeyboardInterrupt:
        answered = sum(future.done() for future in futures)
        print(
            f"interrupted: {answered} of {len(futures)} prompts are answered. Those at the site go on there; fetch "
            f"all answers within half an hour with resume('{group}').",
            file=sys.stderr,
        )
        raise
    return [error_of(future) or future.result() for future in futures]


def resumed(transport: Transport, group: str, timeout_s: float, progress: bool | None) -> list[Any]:
    """What ``GlobusClient.resume`` says."""
    tasks = transport.tasks(group)
    with progress_bar(f"tasks of {group[:8]}", len(tasks), progress) as advance:
        for task in tasks:
            task.add_done_callback(lambda _: advance())
        done = wait_for(tasks, timeout=timeout_s).done
    transport.release(group)
    answers = [task.result() for task in tasks if task in done and not error_of(task)]
    missing = TaskFailed(
        "There is no answer to this prompt: it was not sent, its task failed or is still under way, or the result "
        "is no longer kept. Send it again."
    )
    found = in_order(answers)
    if tasks and not found:
        reasons = [transport.failure(error).error for task in done if (error := error_of(task))]
        raise reasons[0] if reasons else missing
    return [
        missing if answer is None else answer if isinstance(answer, GatewayError) else read(bodies.reading, answer)
        for answer in found
    ]
