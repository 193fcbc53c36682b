"""The supervisor's next step: pure. From an observation (``Seen``) it decides which parts to start or end.

Three parts, each kept alive: the edge, the Ray head, and the Serve application that is deployed on the head. A part
that dies is restarted: at once the first time, then with increasing back-off while it dies repeatedly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from gateway_plugin.processes import Mark

HEALTHY_S = 10.0
"""Earlier deaths of a part are reset once it has lived for this long."""
BACK_OFF_FIRST_S = 0.5
BACK_OFF_MAX_S = 30.0
HEAD_START_LIMIT_S = 120.0
DEPLOY_LIMIT_S = 120.0
"""Well below the 300 s that ``up`` waits, so that a hanging deployment is retried before ``up`` gives up."""
NOT_READY_LIMIT_S = 60.0
"""A deployed application that is not ready for this long is checked, and deployed again if it is gone."""
BUSY_LIMIT_S = 600.0
"""How long an application without answers counts as busy while all its processes live. Serve itself replaces one that
hangs for good within this time (``serve.app``)."""


class Phase(StrEnum):
    """The phase of a part."""

    DOWN = "down"
    """Not running; started when ``retry_at`` is due and the parts it depends on are there."""
    STARTING = "starting"
    """Its process runs and does not answer yet."""
    RUNNING = "running"
    """It answers."""


class PartName(StrEnum):
    """The three parts, in the order they start in."""

    EDGE = "edge"
    HEAD = "head"
    SERVE = "serve"


class Action(StrEnum):
    """An action for the shell."""

    START_EDGE = "start edge"
    START_HEAD = "start head"
    """Remove the remains of an earlier head, then start one."""
    END_HEAD = "end head"
    """End the remains of a head that has failed."""
    START_DEPLOY = "start deploy"
    END_DEPLOY = "end deploy"


@dataclass(frozen=True)
class Part:
    """One part as the supervisor last observed it."""

    phase: Phase = Phase.DOWN
    mark: Mark | None = None
    """Its process: HAProxy, ``ray start --block``, or the driver that deploys."""
    since: float = 0.0
    """When the phase began."""
    deaths: int = 0
    """Deaths in a row, without ``HEALTHY_S`` of life between them."""
    restarts: int = 0
    retry_at: float = 0.0
    error: str = ""
    """The reason for the last death."""
    silent_since: float | None = None
    """For the application: since when it has been too busy to answer."""


@dataclass(frozen=True)
class Plan:
    """All parts."""

    edge: Part = Part()
    head: Part = Part()
    serve: Part = Part()


@dataclass(frozen=True)
class Seen:
    """One observation of the processes. ``*_end`` is the reason when one is gone, else empty."""

    edge_alive: bool = False
    edge_answers: bool = False
    edge_end: str = ""
    head_alive: bool = False
    """``ray start`` runs, and with it its GCS and raylet."""
    head_answers: bool = False
    head_end: str = ""
    deploy_alive: bool = False
    deploy_ok: bool = False
    """The last driver that ended was successful."""
    deploy_end: str = ""
    ready: bool = False
    """``GET /ready`` through the edge returns 200."""
    busy: bool = False
    """``GET /ready`` gets no answer, and every process of the application lives."""


def back_off_s(deaths: int) -> float:
    """Seconds to wait before the next start after ``deaths`` in a row: 0, 0.5, 1, 2 ... 30."""
    if deaths <= 1:
        return 0.0
    return float(min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2 ** min(deaths - 2, 16)))


def decide(plan: Plan, seen: Seen, now: float) -> tuple[Plan, tuple[Action, ...]]:
    """The next plan and the actions for it.

    Edge: (1) due: start, (2) died: count it, (3) answers: running.
    Head: (4) due: start, (5) died or lost a process: end the rest, count it, and the application waits for the next,
    (6) answers: running, (7) never answers: treated as dead. Application: (8) head runs and due: deploy, (9) the driver
    failed or hangs: count it, (10) ready: running, (11) busy: still running; (12) deployed and not ready for long:
    check again.
    """
    edge, edge_actions = _edge(plan.edge, seen, now)
    head, head_actions = _head(plan.head, seen, now)
    serve, serve_actions = _serve(plan.serve, head.phase is Phase.RUNNING, seen, now)
    return Plan(edge, head, serve), edge_actions + head_actions + serve_actions


def _edge(part: Part, seen: Seen, now: float) -> tuple[Part, tuple[Action, ...]]:
    if part.phase is Phase.DOWN:  # (1)
        if now < part.retry_at:
            return part, ()
        return replace(part, phase=Phase.STARTING, since=now), (Action.START_EDGE,)
    if not seen.edge_alive:  # (2)
        return _died(part, seen.edge_end or "ended", now), ()
    return _answering(part, seen.edge_answers, now), ()  # (3)


def _head(part: Part, seen: Seen, now: float) -> tuple[Part, tuple[Action, ...]]:
    if part.phase is Phase.DOWN:  # (4)
        if now < part.retry_at:
            return part, ()
        return replace(part, phase=Phase.STARTING, since=now), (Action.START_HEAD,)
    if not seen.head_alive:  # (5)
        return _died(part, seen.head_end or "ended", now), (Action.END_HEAD,)
    if part.phase is Phase.STARTING and not seen.head_answers and now - part.since > HEAD_START_LIMIT_S:  # (7)
        return _died(part, f"no answer within {HEAD_START_LIMIT_S:.0f} s", now), (Action.END_HEAD,)
    return _answering(part, seen.head_answers, now), ()  # (6)


def _serve(part: Part, head_runs: bool, seen: Seen, now: float) -> tuple[Part, tuple[Action, ...]]:
    if not head_runs:
        if part.phase is Phase.DOWN:
            return part, ()
        gone = replace(part, phase=Phase.DOWN, mark=None, since=now, retry_at=now)
        return gone, (Action.END_DEPLOY,) if seen.deploy_alive else ()
    if part.phase is Phase.DOWN:
        if now < part.retry_at:
            return part, ()
        return replace(part, phase=Phase.STARTING, since=now), (Action.START_DEPLOY,)  # (8)
    if seen.ready and not seen.deploy_alive:  # (10)
        return _answering(replace(part, silent_since=None), True, now), ()
    if seen.deploy_alive:
        if now - part.since > DEPLOY_LIMIT_S:  # (9)
            return _died(part, f"not deployed within {DEPLOY_LIMIT_S:.0f} s", now), (Action.END_DEPLOY,)
        return part, ()
    if part.mark is not None and not seen.deploy_ok:  # (9)
        return _died(part, seen.deploy_end or "deployment failed", now), ()
    if part.phase is Phase.RUNNING:
        silent_since = now if part.silent_since is None else part.silent_since
        if seen.busy and now - silent_since <= BUSY_LIMIT_S:  # (11)
            return replace(part, silent_since=silent_since), ()
        return replace(part, phase=Phase.STARTING, since=now, silent_since=None), ()
    if now - part.since > NOT_READY_LIMIT_S:  # (12)
        return replace(part, since=now, mark=None), (Action.START_DEPLOY,)
    return part, ()


def _died(part: Part, error: str, now: float) -> Part:
    lived_well = part.phase is Phase.RUNNING and now - part.since >= HEALTHY_S
    deaths = 1 if lived_well else part.deaths + 1
    return replace(
        part,
        phase=Phase.DOWN,
        mark=None,
        since=now,
        deaths=deaths,
        restarts=part.restarts + 1,
        retry_at=now + back_off_s(deaths),
        error=error,
    )


def _answering(part: Part, answers: bool, now: float) -> Part:
    if answers and part.phase is Phase.STARTING:
        return replace(part, phase=Phase.RUNNING, since=now)
    if part.phase is Phase.RUNNING and now - part.since >= HEALTHY_S and part.deaths:
        return replace(part, deaths=0)
    return part


def with_mark(plan: Plan, name: PartName, mark: Mark | None) -> Plan:
    """The plan with the process that a start action created."""
    part: Part = getattr(plan, name.value)
    return replace(plan, **{name.value: replace(part, mark=mark)})


def could_not_start(plan: Plan, name: PartName, error: str, now: float) -> Plan:
    """The plan after a start action failed before there was a process."""
    part: Part = getattr(plan, name.value)
    return replace(plan, **{name.value: _died(part, error, now)})


def adopted(edge: Mark | None, head: Mark | None, now: float) -> Plan:
    """The plan of a supervisor that adopts a live edge or head of an earlier one."""
    edge_part = Part() if edge is None else Part(phase=Phase.STARTING, mark=edge, since=now)
    head_part = Part() if head is None else Part(phase=Phase.STARTING, mark=head, since=now)
    return Plan(edge=edge_part, head=head_part)
