"""When a block leaves: the decision alone. ``test_script_runs.py`` has the same promises with processes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from gateway_plugin.blocks.leaving import CANCELLED, Leaving, Settings, Watch

DAY = 1_790_000_000.0
"""The wall clock when the machine's shows 100 s."""


def yes() -> bool:
    return True


def no() -> bool:
    return False


@pytest.mark.parametrize(
    ("watch", "now", "marked", "engines", "reason"),
    [
        (Watch(Leaving()), 100.0, no, yes, None),
        (Watch(Leaving()), 100.0, yes, yes, ("told to by its mark", CANCELLED)),
        (Watch(Leaving(), look_at=101.0), 100.0, yes, yes, None),
        (Watch(Leaving(before_end_s=30), ends=131.0), 100.0, no, yes, None),
        (Watch(Leaving(before_end_s=30), ends=130.0), 100.0, no, yes, ("its walltime ends", 0)),
        (Watch(Leaving(), until=110.0), 100.0, no, yes, None),
        (Watch(Leaving(), until=110.0), 100.0, no, no, ("no engine is left", CANCELLED)),
        (Watch(Leaving(), until=110.0, code=0), 110.0, yes, yes, ("its notice ends", 0)),
    ],
)
def test_why_it_leaves(
    watch: Watch, now: float, marked: Callable[[], bool], engines: Callable[[], bool], reason: tuple[str, int] | None
) -> None:
    assert watch.reason(now, marked, engines) == reason


def test_the_shared_file_system_is_looked_at_now_and_then() -> None:
    watch, looks = Watch(Leaving(look_every_s=10)), 0

    def marked() -> bool:
        nonlocal looks
        looks += 1
        return False

    for second in range(60):
        watch.reason(100.0 + second, marked, no)
    assert looks == 6


def test_an_end_by_the_wall_clock_counts_from_when_it_was_told() -> None:
    watch = Watch(Leaving())
    assert watch.told_end(int(DAY) + 300, 100.0, DAY)
    assert watch.ends == 400.0
    assert not watch.told_end(int(DAY) + 300, 160.0, DAY + 3660), "the clock was set: it says nothing new"
    assert watch.ends == 400.0
    assert watch.told_end(int(DAY) + 200, 160.0, DAY + 60), "shortened"
    assert watch.ends == 300.0


def test_a_notice_is_given_once() -> None:
    watch = Watch(Leaving(notice_s=20))
    assert watch.give_notice(0, 100.0)
    assert not watch.give_notice(CANCELLED, 110.0)
    assert (watch.until, watch.code) == (120.0, 0)


def test_slurm_is_asked_rarely_and_once_more_before_the_end() -> None:
    watch = Watch(Leaving(ask_every_s=300, before_end_s=30))
    watch.asked(100.0, 0.0)
    assert watch.ask_at == 400.0
    watch.asked(100.0, 1.0)
    assert watch.ask_at == 550.0
    watch.ends = 500.0
    watch.asked(100.0, 1.0)
    assert watch.ask_at == 410.0
    watch.asked(400.0, 0.0)
    assert watch.ask_at == 700.0, "the end is too near for another"


def test_settings_are_read_as_they_were_written() -> None:
    settings = Settings("gw-a-1", "h:1", "/s", "/tmp", "python", ("--num-cpus=1",), {"A": "'\"$"}, Leaving(60), "/r")
    assert Settings.parse(settings.text()) == settings


def test_settings_of_another_version_are_read() -> None:
    settings = Settings("gw-a-1", "h:1", "/s", leaving=Leaving(notice_s=5))
    said = json.loads(settings.text())
    later = {**said, "new": 1, "leaving": {**said["leaving"], "new": 1}}
    assert Settings.parse(json.dumps(later)) == settings
    earlier = {"name": "gw-a-1", "head": "h:1", "state": "/s", "leaving": {"notice_s": 5}}
    assert Settings.parse(json.dumps(earlier)) == settings
