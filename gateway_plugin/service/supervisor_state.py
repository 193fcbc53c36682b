"""``supervisor.json``: how far the supervisor is with each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import StrictInt, field_validator

from gateway_plugin.paths import Layout
from gateway_plugin.processes import Mark
from gateway_plugin.service.restart_policy import Part, Phase, Plan
from gateway_plugin.service_state import ServiceRecord
from gateway_plugin.state_file import LenientState, StateFile


class PartState(LenientState):
    """One part (``edge``, ``head``, ``serve``). Times are seconds by the supervisor's clock."""

    phase: Phase = Phase.DOWN
    pid: StrictInt | None = None
    started: float | None = None
    """With ``ticks`` and ``boot`` as in ``Mark``."""
    ticks: StrictInt = 0
    boot: str = ""
    since: float = 0.0
    restarts: StrictInt = 0
    deaths: StrictInt = 0
    retry_at: float = 0.0
    last_error: str = ""

    @property
    def mark(self) -> Mark | None:
        """Its process, alive or not."""
        if not self.pid or self.started is None:
            return None
        return Mark(self.pid, self.started, self.ticks, self.boot)


class SupervisorState(LenientState):
    """The whole file."""

    stage: str = ""
    """``running``, or ``stopping``."""
    updated: float = 0.0
    supervisor: Mark | None = None
    parts: Mapping[str, PartState] = {}
    service: Mapping[str, Any] = {}
    """A copy of ``service.json``, on another disk than that."""

    @field_validator("parts", mode="before")
    @classmethod
    def _without_malformed(cls, value: Any) -> Any:
        """One malformed part takes no other with it."""
        if not isinstance(value, Mapping):
            return value
        return {name: part for name, part in value.items() if isinstance(part, (Mapping, PartState))}

    def part(self, name: str) -> PartState:
        """The part called ``name``; one that is down if it is not noted."""
        return self.parts.get(name, PartState())


def supervisor_state(plan: Plan, stage: str, supervisor: Mark, now: float, record: ServiceRecord) -> SupervisorState:
    """What the supervisor writes."""
    parts = {name: _part_state(getattr(plan, name)) for name in ("edge", "head", "serve")}
    return SupervisorState(
        stage=stage, updated=now, supervisor=supervisor, parts=parts, service=record.model_dump(mode="json")
    )


def _part_state(part: Part) -> PartState:
    process = asdict(part.mark) if part.mark is not None else {}
    return PartState.model_validate(
        {
            **process, "phase": part.phase, "since": part.since, "restarts": part.restarts, "deaths": part.deaths,
            "retry_at": part.retry_at, "last_error": part.error,
        }
    )  # fmt: skip


def supervisor_file(layout: Layout) -> StateFile[SupervisorState]:
    """Where it is written."""
    return StateFile(layout.supervisor_status, SupervisorState)


def read_status(layout: Layout) -> SupervisorState:
    """The last ``supervisor.json``; an empty one where there is none that can be read: it is written again."""
    return supervisor_file(layout).read_or_none() or SupervisorState()
