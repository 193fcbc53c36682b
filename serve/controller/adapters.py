"""Adapters of models that are loaded, when the catalog changes: their engines load them before the names are routed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from gateway_plugin.adapter_folders import fitting_folder
from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from serve.core.handlers.admin import adapters_only
from serve.core.state import EngineState, Fleet

log = logging.getLogger("gateway.controller")

_WITHIN_S = 120.0
DONE, REFUSED = "done", "refused"

Call = Callable[..., Awaitable[Any]]
"""(node, verb, arguments) -> the answer of the node's agent."""


@dataclass(frozen=True)
class Update:
    """The adapters that one engine is to serve."""

    engine: str
    node: str
    adapters: Mapping[str, str]


def updates(fleet: Fleet, models: Sequence[Model]) -> tuple[Update, ...]:
    """Engines that need no reload if they can take their entry's new adapters. Pure."""
    return tuple(
        Update(engine, fleet.engines[engine].node, model.adapters or {})
        for model in models
        if model.name in fleet.models and adapters_only(fleet.models[model.name], model)
        for engine in fleet.model_engines.get(model.name, ())
        if fleet.engines[engine].state is EngineState.READY
    )


def new_adapters(fleet: Fleet, models: Sequence[Model]) -> list[tuple[Model, str, str]]:
    """Base, name and folder of each adapter that its base does not have in the present catalog. Pure."""
    known = {(model.name, *pair) for model in fleet.models.values() for pair in (model.adapters or {}).items()}
    wanted = [(model, *pair) for model in models for pair in (model.adapters or {}).items()]
    return [(model, name, path) for model, name, path in wanted if (model.name, name, path) not in known]


async def adapt_engines(fleet: Fleet, models: Sequence[Model], call: Call) -> frozenset[str]:
    """The engines that serve the adapters of the new catalog ``models`` without a reload.

    Raises ``ConfigError`` for a folder that is no adapter, or another base's, and for one that an engine refuses.
    """
    for adapter in new_adapters(fleet, models):
        await asyncio.to_thread(fitting_folder, *adapter)
    asked = updates(fleet, models)
    outcomes = await asyncio.gather(*(_one(update, call) for update in asked))
    for update, (outcome, why) in zip(asked, outcomes, strict=True):
        if outcome == REFUSED:
            await give_back(fleet, models, call)
            raise ConfigError(f"The catalog was not changed: the engine {update.engine} refuses an adapter: {why}")
    return frozenset(update.engine for update, (outcome, _) in zip(asked, outcomes, strict=True) if outcome == DONE)


async def give_back(fleet: Fleet, models: Sequence[Model], call: Call) -> None:
    """Have the engines serve the adapters of the present catalog again: ``models`` are refused."""
    before = (Update(one.engine, one.node, _adapters(fleet, one.engine)) for one in updates(fleet, models))
    await asyncio.gather(*(_one(update, call) for update in before))


def _adapters(fleet: Fleet, engine: str) -> Mapping[str, str]:
    return fleet.models[fleet.engines[engine].model].adapters or {}


async def _one(update: Update, call: Call) -> tuple[str, str]:
    try:
        asked = call(update.node, "adapt", update.engine, dict(update.adapters))
        outcome, why = await asyncio.wait_for(asked, _WITHIN_S)
    except (KeyError, AttributeError, TimeoutError, RayError) as error:  # no agent, or one of an earlier version
        outcome, why = "reload", type(error).__name__
    log.info("adapt", extra={"engine": update.engine, "outcome": outcome, "why": why})
    return outcome, why
