"""The world's blocks: how long each lasts, who is told to end, and what the ledger has told the controller of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gateway_plugin.phases import BlockPhase
from serve.core import events as ev
from tests.unit.core.things import Agent

if TYPE_CHECKING:
    from tests.unit.core.world import World

ENDED = ("completed", "cancelled", "failed", "lost")


class Blocks:
    """One block a node, called ``block-NODE``."""

    def __init__(self, world: World, walltimes: tuple[float | None, ...]) -> None:
        self.world = world
        self.walltimes = walltimes
        self.all: dict[str, ev.SeenBlock] = {}
        self.told: dict[str, ev.SeenBlock] = {}
        """As this controller heard of them last."""
        self.leaves_told: dict[str, float] = {}
        """Block -> when it must leave since it was told to end or has ended, as far as this controller was told."""
        self.noticed: dict[str, float] = {}
        """Node -> until when, as its agent told this controller."""

    @property
    def limited(self) -> bool:
        return self.walltimes != (None,)

    # --- what happens to them ---
    def ask(self, node: str, kind: str) -> None:
        name = f"block-{node}"
        self.all[name] = ev.SeenBlock(name, kind, BlockPhase.PENDING, self.world.now)

    def start(self, agent: Agent) -> None:
        """Its job runs, and lasts as long as chance will have it."""
        block = self.all.get(agent.block)
        if block is not None and block.phase is BlockPhase.PENDING:
            lasts = self.world.random.choice(self.walltimes)
            ends_at = None if lasts is None else self.world.now + lasts
            self.all[block.name] = replace(block, phase=BlockPhase.RUNNING, starts_at=self.world.now, ends_at=ends_at)

    def end(self, name: str, phase: str) -> None:
        if name in self.all and not self.all[name].phase.ended:
            self.all[name] = replace(self.all[name], phase=BlockPhase(phase), ended_at=self.world.now)

    def pass_time(self) -> None:
        """Blocks whose time is over leave by themselves, whatever is in flight."""
        for agent in list(self.world.agents.values()):
            block = self.all.get(agent.block)
            if block is None or block.starts_at is None or block.phase.ended:
                continue
            ends = [agent.until] if agent.until is not None else []
            if block.ends_at is not None:
                ends.append(block.ends_at - self.world.policy.leave_before_end_s)
            if ends and self.world.now > min(ends) + 0.5:
                self.world.lose_agent(agent, node_alive=False)
                self.end(block.name, "completed")

    def notice(self, agent: Agent) -> None:
        """Somebody cancels it: it says so, and has some seconds."""
        agent.until = self.world.now + 15.0
        agent.word.append(ev.NodeLeaves(agent.id, agent.until, "cancelled"))
        if agent.block in self.all:
            self.all[agent.block] = replace(self.all[agent.block], phase=BlockPhase.CANCELLING)

    def vanish(self, agent: Agent) -> None:
        """Its machine is gone, and nobody says so but the ledger."""
        agent.up, agent.gone, agent.commands, agent.word = False, True, [], []
        self.world.end_processes(agent)
        self.end(agent.block, "lost")

    # --- what the controller knows ---
    def forget(self) -> None:
        """Another controller: it was told nothing yet."""
        self.told, self.leaves_told, self.noticed = {}, {}, {}

    def tell(self) -> None:
        """The ledger is read."""
        policy, now = self.world.policy, self.world.now
        self.told = dict(self.all)
        for block in self.told.values():
            if block.phase == "cancelling":
                self.leaves_told.setdefault(block.name, now + policy.notice_s)
            elif block.phase.ended:
                self.leaves_told[block.name] = min(now, self.leaves_told.get(block.name, now))
        self.world.tell(ev.BlocksSeen(tuple(self.told.values())))

    def leaves_at(self, node: str) -> float | None:
        """The earliest time at which ``node`` leaves, by all that this controller was told."""
        block = self.told.get(f"block-{node}")
        times = [self.noticed.get(node), self.leaves_told.get(f"block-{node}")]
        if block is not None and block.ends_at is not None:
            times.append(block.ends_at - self.world.policy.leave_before_end_s)
        return min((time for time in times if time is not None), default=None)

    def is_leaving(self, node: str) -> bool:
        """By all that this controller was told, the node takes no new request any more."""
        block, policy = self.told.get(f"block-{node}"), self.world.policy
        if node in self.noticed or f"block-{node}" in self.leaves_told:
            return True
        if block is None or block.ends_at is None or block.starts_at is None:
            return False
        drains = min(policy.drain_before_end_s, (block.ends_at - block.starts_at) / 4)
        return self.world.now >= block.ends_at - policy.leave_before_end_s - drains

    def given_up(self, node: str) -> bool:
        """Its block has ended, half a minute ago or more: no word is waited for."""
        leaves = self.leaves_told.get(f"block-{node}")
        ended = self.told.get(f"block-{node}")
        given = self.world.policy.command_retry_s
        return leaves is not None and ended is not None and ended.phase.ended and self.world.now >= leaves + given
