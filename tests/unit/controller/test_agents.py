"""How the end of an agent is told to the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray

from gateway_plugin.clock import SteadyClock
from serve.controller.agents import Agents
from serve.core.events import Event, NodeFailed, NodeGone, NodeJoined

JOINED = NodeJoined("n", "t", "b", "10.0.0.1", 0, ())
DIED = ray.exceptions.RayActorError()
RAISED = ray.exceptions.RayTaskError("describe", "Traceback\nValueError: no such thing", ValueError("no such thing"))


class Agent:
    """One that ends with ``error``, before or after it has described its node."""

    def __init__(self, error: Exception, *, joins: bool) -> None:
        self._error, self._joins = error, joins

    def __getattr__(self, verb: str) -> Any:
        async def answer(*_: object) -> Any:
            if verb == "ray_node":
                return "r1"
            if verb == "describe" and self._joins:
                return JOINED, 0
            raise self._error

        return type("Verb", (), {"remote": staticmethod(answer)})


@pytest.mark.parametrize("node_alive", [True, False])
@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("error", [DIED, RAISED])
async def test_an_agent_that_ends_is_told_and_its_node_is_kept_where_it_lives(
    monkeypatch: pytest.MonkeyPatch, error: Exception, joins: bool, node_alive: bool
) -> None:
    killed: list[object] = []
    monkeypatch.setattr("ray.kill", killed.append)
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "r1", "Alive": node_alive}])
    agent = Agent(error, joins=joins)
    found: Callable[..., Agent] = lambda *_, **__: agent  # noqa: E731
    monkeypatch.setattr("ray.get_actor", found)
    events: list[Event] = []
    agents = Agents((), lambda node, kind: (object, ()), events.append, SteadyClock())
    await agents.find("n")
    await agents._watchers["n"]
    told = events[-1]
    assert events[:-1] == [JOINED] * joins
    assert killed == [agent] * (error is RAISED)
    assert agents._handles == {}
    if joins:
        assert isinstance(told, NodeGone)
        assert told.node_alive == (node_alive and error is DIED)
        assert agents._ray_nodes == ({"n": "r1"} if told.node_alive else {})
    else:
        assert isinstance(told, NodeFailed)
        assert agents._ray_nodes == {}
    if error is RAISED:
        assert told.reason == "ValueError: no such thing"
