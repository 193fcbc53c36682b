"""Numbers that the decisions use, and what may be asked for: values from the site's configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeKind:
    """What the controller may ask for: one of the site's node types."""

    name: str
    host_mib: int
    gpu_mib: tuple[int, ...]
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True)
class Policy:
    """Numbers that the decisions use; from the site's ``Limits``."""

    kinds: tuple[NodeKind, ...] = ()
    slots: int = 64
    """Backends at the edge."""
    servers_per_slot: int = 8
    waiting_max: int = 1000
    abandoned_load_grace_s: float = 2.0
    """So long after its last waiter left a load may be stopped for another model that needs its room."""
    unclaimed_s: float = 120.0
    """What was loaded for somebody who left is kept for so long, if nobody needs its room."""
    block_idle_s: float = 200.0
    """A node without an engine and without demand is kept for so long."""
    block_unused_s: float | None = 1800.0
    """A node whose engines have all been unused for so long is given back; ``None``: never."""
    last_block_idle_s: float = 3600.0
    """The last node of all is kept for so long, empty or unused: whoever comes next finds it."""
    pending_idle_s: float = 120.0
    """A pending node that nobody needs any more is kept for so long: its place in the queue is worth something, because
    what is evicted to make room for one model is often what the next one waits for (``benchmarks.growth``)."""
    promise_max_s: float = 43200.0
    """A client that was told when to come back is expected for so long at most: its model stays wanted until then."""
    kind_retry_s: float = 1800.0
    """So long a kind is not asked for whose blocks die early or can never start."""
    early_deaths_max: int = 3
    """So many of its blocks in a row."""
    lived_s: float = 60.0
    """A block that fails so soon after its start died early."""
    submit_retry_first_s: float = 5.0
    """Back-off after the scheduler refused a block: doubles from here ..."""
    submit_retry_max_s: float = 60.0
    """... to here, and goes on for ever: schedulers come back."""
    retry_first_s: float = 2.0
    """Back-off after a failed load: doubles from here ..."""
    retry_max_s: float = 300.0
    failures_per_wait: int = 3
    """After so many failed loads in a row the waiters get the engine's last words instead of another try."""
    load_guess_s: float = 60.0
    """Expected load time of a model never loaded here."""
    first_use_grace_s: float = 2.0
    """So long after a waiter was told to go its engine is not idle, unless it was used since."""
    crash_window_s: float = 5.0
    """An engine that dies so soon after it was ready counts as a failure; the first one costs no back-off."""
    crashes_per_wait: int = 12
    """The same for engines that died so with requests on board, one of which may be the cause, and none answered."""
    drain_before_end_s: float = 300.0
    """So long before its block leaves a node takes no new request; at most a quarter of its walltime."""
    leave_before_end_s: float = 30.0
    """So long before its walltime ends a block leaves by itself."""
    notice_s: float = 20.0
    """How long a block that was told to end stays, where nobody says."""
    leave_grace_s: float = 5.0
    """What is in flight gets so long at least, however late it was known that a node leaves."""
    succession_used_s: float = 600.0
    """A model used so lately is loaded elsewhere before its node's block ends."""
    succession_margin_s: float = 10.0
    """What was seen of queue, start and load does not count: Ray's and Slurm's own rounds, and luck."""
    queue_wait_guess_s: float = 60.0
    """How long a job waits in the queue, before any has started."""
    block_start_guess_s: float = 30.0
    """How long it takes from a job's start until its node's agent reports, before any has."""
    growth_after_s: float = 2.0
    """A waiting model asks for a node after so long, or at once if no node here could hold it even empty."""
    settle_s: float = 30.0
    """After a restart: how long agents that were found may take to report."""
    route_retry_s: float = 0.25
    """After a refused route command; doubles with each in a row."""
    route_refusals_max: int = 6
    command_retry_s: float = 30.0
    """A stop without an outcome is sent again; an unacknowledged route command is taken for lost after twice that."""


DOUBT_S = 3.0
"""After a death: who had a request on the engine is at the ingress by then, or was answered by another engine."""


REOPENS_S = 2.0
"""After a death: a request that the edge tries again after its pause of a second finds no engine, and goes to the
ingress. A new one would be its next victim, as the edge cannot be told to prefer the ingress for a second try."""


APART_S = 20.0
"""After the ingress said that it has suspects of the model, or that somebody waits for it."""

GRANT_STEP_S = 0.5
"""``Engine.answered_at`` is not rewritten for every request to a busy model."""
