"""The one word of ``gateway status``, for which ``up`` waits."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.service.status import word

ALL = ("supervisor", "edge", "head", "serve")
READY, STARTING = {"state": "ready"}, {"state": "starting"}


def parts(restarts: int = 0, **states: str) -> dict[str, Any]:
    return {name: {"state": states.get(name, "running"), "restarts": restarts} for name in ALL}


@pytest.mark.parametrize(
    ("found", "gateway", "says"),
    [
        (parts(), READY, "ready"),
        (parts(restarts=2), READY, "ready"),
        (parts(), STARTING, "starting"),
        (parts(serve="starting"), READY, "starting"),
        (parts(serve="starting"), None, "starting"),
        (parts(head="starting", serve="down"), None, "starting"),
        (parts(restarts=1, serve="starting"), READY, "degraded"),
        (parts(restarts=1), None, "degraded"),
        (parts(edge="silent"), READY, "degraded"),
        (parts(supervisor="dead", serve="unknown"), READY, "degraded"),
        (parts(supervisor="dead"), READY, "degraded"),
        (parts(head="dead", serve="down"), None, "degraded"),
    ],
)
def test_ready_is_what_all_parts_say_and_coming_up_is_no_trouble(
    found: dict[str, Any], gateway: dict[str, str] | None, says: str
) -> None:
    assert word(found, gateway) == says
