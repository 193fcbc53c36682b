"""What ``gateway chat`` says while its model is not there."""

from __future__ import annotations

import re
import threading

import pytest

from gateway_plugin.api_types import ModelInfo
from gateway_plugin.cli import waiting
from gateway_plugin.cli.waiting import Waiting
from gateway_plugin.errors import GatewayUnreachable


class Looks:
    """A client whose model is as the story says; ``over`` is set when the story has been told twice."""

    def __init__(self, *story: ModelInfo | None) -> None:
        self._story = list(story)
        self.over = threading.Event()

    def model(self, name: str) -> ModelInfo:
        found = self._story.pop(0) if len(self._story) > 1 else self._story[0]
        if len(self._story) == 1:
            self.over.set()
        if found is None:
            raise GatewayUnreachable("away")
        return found


def a_model(state: str, reason: str | None = None, eta_s: float | None = None) -> ModelInfo:
    return ModelInfo("m", "generate", state, reason=reason, eta_s=eta_s)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.01)


def said(looks: Looks, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with Waiting(looks, "m"):  # type: ignore[arg-type]
        assert looks.over.wait(10)
    lines = capsys.readouterr().err.splitlines()
    return [re.sub(r"^ +[0-9.]+ s  ", "", line) for line in lines]


def test_a_line_for_every_change_that_is_not_only_time(capsys: pytest.CaptureFixture[str]) -> None:
    looks = Looks(
        a_model("queued", "job 7 waits: Resources, expected to start in 40 s", 70),
        a_model("queued", "job 7 waits: Resources, expected to start in 38 s", 68),
        a_model("queued", "job 7 has started on n3", 30),
        a_model("loading", None, 12),
        a_model("ready"),
    )
    assert said(looks, capsys) == [
        "m: queued (job 7 waits: Resources, expected to start in 40 s, ready in about 70 s)",
        "m: queued (job 7 has started on n3, ready in about 30 s)",
        "m: loading (ready in about 12 s)",
    ]


def test_a_gateway_that_is_away_is_left_to_the_request_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(Looks(None), capsys) == []
