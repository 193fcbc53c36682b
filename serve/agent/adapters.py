"""LoRA adapters of an engine that runs: loaded and unloaded by its own requests, as vLLM takes them.

It needs no more than the engine's record, and so no part of what watches the engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from gateway_plugin.adapter_folders import adapter_folder
from gateway_plugin.errors import ConfigError
from gateway_plugin.masking import masked
from gateway_plugin.paths import Layout
from serve.agent import records
from serve.agent.probe import Probe, ProbeFailed, client_context

logger = logging.getLogger(__name__)

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LOAD_S = 60.0
_ASK_S = 10.0
_WORDS = 300

DONE, RELOAD, REFUSED = "done", "reload", "refused"
"""It serves them; it has to be loaded again for them; an adapter is bad, and a reload would fail too."""


async def adapt(layout: Layout, engine: str, wanted: Mapping[str, str]) -> tuple[str, str]:
    """Have ``engine`` serve the adapters ``wanted`` (name -> folder) and no others.

    Returns ``DONE``, ``RELOAD`` or ``REFUSED``, and why.
    """
    record = next((one for one in records.read_all(layout) if one.engine == engine), None)
    if record is None or not record.ready or record.sleep:
        return RELOAD, "it does not serve now"
    probe = Probe(record.address, client_context(layout), record.key)
    try:
        outcome, why = await _adapt(probe, wanted)
    except ConfigError as error:
        outcome, why = REFUSED, error.message
    except ProbeFailed as failure:
        outcome, why = RELOAD, failure.message
    finally:
        await probe.close()
    why = masked(why, (record.key, *record.secrets))
    logger.info("engine adapted engine=%s outcome=%s why=%s", engine, outcome, why)
    return outcome, why


async def _adapt(probe: Probe, wanted: Mapping[str, str]) -> tuple[str, str]:
    """(1) what it has; (2) new ones; (3) those with another folder, which are away for a moment (vLLM would load one
    that was replaced in place from its folder again at each request); (4) those that are gone, which are asked for
    until then. A bad new adapter leaves the others untouched."""
    folders = {name: str(adapter_folder(name, path)[0]) for name, path in wanted.items()}
    loaded = await _loaded(probe)  # (1)
    for name in sorted(folders, key=lambda name: name in loaded):
        if loaded.get(name) == folders[name]:
            continue
        if name in loaded and (why := await _unloaded(probe, name)):  # (3)
            return RELOAD, why
        status, answer = await probe.call("POST", _LOAD, {"lora_name": name, "lora_path": folders[name]}, _LOAD_S)
        if status != 200:
            why = _words(f"{_LOAD} of {name}", status, answer)
            return (RELOAD if _may_load_it_anew(status, answer) else REFUSED), why
    for name in loaded.keys() - folders.keys():  # (4)
        if why := await _unloaded(probe, name):
            return RELOAD, why
    return DONE, ""


async def _unloaded(probe: Probe, name: str) -> str:
    """``""``, or why not."""
    status, answer = await probe.call("POST", _UNLOAD, {"lora_name": name}, _ASK_S)
    return "" if status == 200 else _words(_UNLOAD, status, answer)


async def _loaded(probe: Probe) -> dict[str, str]:
    """Name -> folder of its adapters, from ``GET /v1/models``. Raises ``ProbeFailed``."""
    status, answer = await probe.call("GET", "/v1/models", None, _ASK_S)
    try:
        cards = json.loads(answer)["data"] if status == 200 else []
        return {str(card["id"]): str(card["root"]) for card in cards if card.get("parent")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ProbeFailed("/v1/models is not as expected") from None


def _may_load_it_anew(status: int, answer: bytes) -> bool:
    """No such path; a rank over the one that it was started with, which a start raises; or a folder that the agent
    sees and the engine does not: a container has those of its start alone."""
    unknown_path = status in (404, 405) and b'"error"' not in answer
    return unknown_path or b"max_lora_rank" in answer or b"No adapter found" in answer


def _words(path: str, status: int, answer: bytes) -> str:
    return f"{path} is answered {status}: {' '.join(answer.decode(errors='replace').split())[:_WORDS]}"
