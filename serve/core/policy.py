"""Parameters of the decisions, and the node types: values from the site's configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeTypeSpec:
    """A node type of the site, which the controller may request."""

    name: str
    host_mib: int
    gpu_mib: tuple[int, ...]
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True)
class Policy:
    """Parameters of the decisions; from the site's ``Limits``."""

    node_types: tuple[NodeTypeSpec, ...] = ()
    switching: str = "pressure"
    """Which decisions are in force: a name in ``serve.core.step.POLICIES``."""
    slots: int = 64
    """Backends at the edge."""
    servers_per_slot: int = 8
    waiting_max: int = 1000
    abandoned_load_grace_s: float = 2.0
    """How long after its last waiter left a load may be stopped for another model."""
    unclaimed_s: float = 120.0
    """How long a model without a request since it loaded is kept, unless its room is needed."""
    block_idle_s: float = 200.0
    """How long a node without demand is kept that has no engine, or none awake."""
    block_unused_s: float | None = 1800.0
    """A node whose engines have all been unused for this time is released; ``None``: never."""
    last_block_idle_s: float = 3600.0
    """How long the last node is kept, empty or unused, for the next request."""
    pending_idle_s: float = 120.0
    """How long an unneeded pending node is kept: its place in the queue has a value, because the models evicted to
    make room for one model are often requested next (``benchmarks.growth``)."""
    demand_kept_max_s: float = 43200.0
    """Upper bound on how long demand is kept for a client that received a 503 with Retry-After."""
    node_type_retry_s: float = 1800.0
    """Back-off of a node type in a crash loop, or whose jobs are unschedulable."""
    early_deaths_max: int = 3
    """Early deaths in a row that count as a crash loop."""
    lived_s: float = 60.0
    """A block that fails within this time after its start died early."""
    submit_retry_first_s: float = 5.0
    """Back-off after the scheduler refused a block: doubles from here ..."""
    submit_retry_max_s: float = 60.0
    """... to here, without a limit of tries: schedulers recover."""
    retry_first_s: float = 2.0
    """Back-off after a failed load: doubles from here ..."""
    retry_max_s: float = 300.0
    failures_per_wait: int = 3
    """Failed loads in a row after which the waiters get the error instead of another try."""
    max_wait_s: float = 60.0
    max_wait_loads: float = 4.0
    """No request waits longer than the larger of ``max_wait_s`` and so many load times of its model while a device that
    could hold it serves another one (``serve.core.policies.pressure``). More: fewer and longer waits."""
    quantum_loads: float = 2.0
    """A model in use keeps its place for so many of its load times, so that a third of the devices' time is lost to
    loading at most. More: less of the devices' time is lost to loading,
    others wait longer."""
    switch_gain: float = 0.3
    """Seconds of waiting ended for each second of waiting that an eviction causes. More: fewer switches, longer waits
    for rarely requested models."""
    head_start_s: float = 5.0
    """Every waiter weighs so much more than it has waited. More: models that are rarely requested go at once, more
    switches."""
    impatience: float = 2.0
    """How much more a second of waiting weighs for each load time that the oldest waiter has waited. More: shorter long
    waits, more switches."""
    load_guess_s: float = 60.0
    """Expected load time of a model never loaded here."""
    wake_guess_s: float = 5.0
    """Expected time to wake an engine of a model of which none was woken here."""
    sleep_once_loaded: bool = True
    """An engine that can sleep does so once, after loading, before it serves (``serve.core.sleep_room``)."""
    sleep_doubts_max: int = 2
    """After so many sleeps or wakes in a row that went wrong the engines of a model are stopped instead."""
    first_use_grace_s: float = 2.0
    """How long an engine is not idle after a request was released to it, unless it was used since."""
    crash_window_s: float = 5.0
    """An engine that crashes within this time after ready counts as a failure; the first costs no back-off."""
    crashes_per_wait: int = 12
    """The same for crashes with requests in flight, one of which may be the cause, while none was answered."""
    drain_before_end_s: float = 300.0
    """How long before its block leaves a node takes no new request; at most a quarter of its walltime."""
    leave_before_end_s: float = 30.0
    """How long before its walltime ends a block leaves by itself."""
    notice_s: float = 20.0
    """How long a cancelled block stays, without a notice."""
    leave_grace_s: float = 5.0
    """Least time for requests in flight, however late the node's end was known."""
    handover_used_s: float = 600.0
    """A model used within this time is loaded elsewhere before its node's block ends."""
    handover_margin_s: float = 10.0
    """Safety margin added to measured queue, start and load times for polling intervals and variance."""
    queue_wait_guess_s: float = 60.0
    """Expected queue time of a job before any has started."""
    block_start_guess_s: float = 30.0
    """Expected time from a job's start until its node's agent reports, before any has."""
    replica_rise_s: float = 5.0
    """A model gets one more engine once its engines have had more requests than their target for this time."""
    replica_fall_s: float = 300.0
    """One of its engines is drained once the others would have had at most ``replica_reserve`` of their target for this
    time; where a model without an engine waits for the room, after ``replica_rise_s``."""
    replica_reserve: float = 0.5
    replica_growth_after_s: float = 30.0
    """A model requests a node for one more engine only if it has lacked it for this time."""
    growth_after_s: float = 2.0
    """A waiting model requests a node after this time, or at once if no node here could hold it even empty."""
    settle_s: float = 30.0
    """After a restart: time for the agents found to report."""
    route_retry_s: float = 0.25
    """After a refused route command; doubles with each in a row."""
    route_refusals_max: int = 6
    command_retry_s: float = 30.0
    """A stop without an outcome is sent again; an unacknowledged route command is taken for lost after twice that."""


DOUBT_S = 3.0
"""After a death: requests of that engine are at the ingress by then, or were answered by another engine."""


REOPENS_S = 2.0
"""After a death: a request that the edge tries again after its pause of a second finds no engine, and goes to the
ingress. A new engine would be its next victim, as the edge cannot prefer the ingress for a second try."""


APART_S = 20.0
"""After the ingress reported suspects of the model, or while requests wait for it."""

GRANT_STEP_S = 0.5
"""``Engine.granted_at`` is not rewritten for every request to a busy model."""
