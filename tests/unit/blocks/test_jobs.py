"""Which jobs a provider has, and what is said of one whose own code is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from parsl.providers import GridEngineProvider

from gateway_plugin.blocks.ledger import Block, BlockPhase
from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.schedulers.base import ASK_EVERY_S, PollLimiter
from gateway_plugin.schedulers.select import scheduler_for
from tests.support.queue import QueueJobs, QueueProvider, Scheduler


class OwnProvider(QueueProvider):
    """A site's own, whose ``gateway_jobs`` is given."""

    def __init__(self, bring: Callable[[Layout], Any]) -> None:
        super().__init__(Scheduler())
        self.gateway_jobs = bring  # type: ignore[method-assign, assignment]


def raises(error: Exception) -> Callable[[Layout], Any]:
    def bring(layout: Layout) -> Any:
        raise error

    return bring


def test_a_provider_may_bring_its_own(tmp_path: Path) -> None:
    assert isinstance(scheduler_for(QueueProvider(Scheduler()), Layout(tmp_path)), QueueJobs)


@pytest.mark.parametrize(
    ("bring", "said"),
    [
        (raises(KeyError("QUEUE")), "OwnProvider.gateway_jobs: KeyError: 'QUEUE'"),
        (
            lambda layout: None,
            "gateway_jobs gave NoneType without submit, status, find, cancel, in_doubt_s",
        ),
        (lambda layout: SimpleNamespace(submit=1, status=1, find=1, cancel=1), "without in_doubt_s; expected a "),
    ],
)
def test_a_mistake_in_it_is_one_line(tmp_path: Path, bring: Callable[[Layout], Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scheduler_for(OwnProvider(bring), Layout(tmp_path))
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_its_own_error_says_enough(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="the queue is closed"):
        scheduler_for(OwnProvider(raises(ServiceError("the queue is closed"))), Layout(tmp_path))


def test_a_provider_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GridEngineProvider: blocks of this Parsl provider cannot be found again"):
        scheduler_for(GridEngineProvider(), Layout(tmp_path))


def test_a_queue_is_asked_rarely_of_jobs_that_are_as_they_were() -> None:
    passed_s = 0.0
    pace = PollLimiter(lambda: passed_s)
    old = Block("gw-a-1", "a", BlockPhase.RUNNING, asked_at=0.0)
    looks = []
    for passed_s in range(0, 61, 2):  # as the monitor does
        looks.append(pace.due([old], 1e6 + passed_s))
    assert sum(looks) == 1 + 60 / ASK_EVERY_S


@pytest.mark.parametrize(("phase", "asked_at"), [(BlockPhase.CANCELLING, 0.0), (BlockPhase.PENDING, 1e6 - 5)])
def test_a_queue_is_asked_at_once_of_jobs_with_which_something_is_under_way(phase: BlockPhase, asked_at: float) -> None:
    pace = PollLimiter(lambda: 7.0)
    blocks = [Block("gw-a-1", "a", BlockPhase.RUNNING, asked_at=0.0), Block("gw-a-2", "a", phase, asked_at=asked_at)]
    assert [pace.due(blocks, 1e6) for _ in range(3)] == [True] * 3


def test_a_queue_is_not_asked_all_the_time_because_the_clock_was_set_back() -> None:
    pace = PollLimiter(lambda: 50.0)
    blocks = [Block("gw-a-1", "a", BlockPhase.RUNNING, asked_at=1e6)]
    assert [pace.due(blocks, 1e6 - 3600) for _ in range(3)] == [True, False, False]
