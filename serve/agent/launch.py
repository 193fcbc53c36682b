"""Starts one engine process and records it on the node's disk."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from gateway_plugin.adapter_folders import on_disk
from gateway_plugin.catalog import Model
from gateway_plugin.engine_records import clear_away, strays
from gateway_plugin.errors import GatewayError
from gateway_plugin.hub_cache import cache_of
from gateway_plugin.isolation import Isolation
from gateway_plugin.masking import secrets_of
from gateway_plugin.paths import Layout, private_folder
from gateway_plugin.processes import BLOCK_MARK, end, group_members
from gateway_plugin.runtimes.here import confined, start_in_runtime
from gateway_plugin.weights import is_local, needs_source, resolve
from serve.agent import records
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env, sleeps_in, visible_devices
from serve.agent.doorman import Doorman, behind, listener
from serve.agent.processes import demand_program, free_port, spawn
from serve.agent.records import EngineRecord
from serve.core.effects import StartEngine

logger = logging.getLogger(__name__)

_TEMPORARY = ("TMPDIR", "VLLM_RPC_BASE_PATH")
"""Variables with an engine's temporary folder, unless its entry or its block sets them. vLLM leaves a file there with
each start (``vllm_dist_*``), and when it is killed its sockets and those of multiprocessing (``pymp-*``). Its own
variable is for its sockets alone: a ``TMPDIR`` of a site may be too long a path for them."""


@dataclass(frozen=True)
class Place:
    """What an engine must know of its node."""

    node: str
    block: str
    host: str
    """The address to listen on."""
    gpu_total_mib: int
    fetched: Path | None = None
    """Where weights from the hub lie; ``None``: engines load them themselves."""
    bare_mib: tuple[int, ...] = ()
    """Memory in use on the engine's GPUs before it starts; ``()``: it is not to sleep here."""


class Launched(NamedTuple):
    """A started engine; ``recorded``: its record is on disk."""

    record: EngineRecord
    child: subprocess.Popen[bytes]
    recorded: bool


def launch(
    layout: Layout,
    place: Place,
    command: StartEngine,
    key: str,
    isolation: Isolation,
    isolate: Literal["auto", "required", "off"],
) -> Launched:
    """Start the engine. Raises ``GatewayError`` or ``OSError``: nothing runs then."""
    model = on_disk(command.model)
    source = model.source
    if needs_source(model):
        source = resolve(model, fetched=place.fetched)
        model = model.model_copy(update={"source": source})  # what was fetched is local: no hub, no token
    sleeps = model.sleeps and bool(place.bare_mib)
    if sleeps and not sleeps_in({**os.environ, **model.variables}):
        logger.warning("engine cannot sleep engine=%s why=expandable_segments in its environment", command.engine)
        sleeps = False
    log = private_folder(layout.engine_logs) / f"{records.file_name(command.engine)}.log"
    folders = _own_folder(layout, command.engine, model)
    tls = TlsFiles(layout.engine_key, layout.engine_certificate, layout.ca)
    try:
        with listener(place.host) if model.behind_doorman else contextlib.nullcontext() as door:
            bind = Bind(place.host, free_port(place.host) if door is None else door.getsockname()[1])
            inner = bind if door is None else _inner(folders if model.on_socket else ())
            argv = engine_argv(model, source, inner, tls, place.gpu_total_mib, sleeps)
            env = engine_env(model, key, command.gpus, visible_devices(os.environ), os.environ, sleeps)
            if folders and not model.contained:
                env = {**dict.fromkeys(_TEMPORARY, str(folders[0])), **env}
            if place.block:
                env[BLOCK_MARK] = place.block  # what has no record, or a garbled one, ends with its block all the same
            if (cache := cache_of(source)) is not None:  # what its options name by a hub name lies there, too
                env.setdefault("HF_HUB_CACHE", str(cache))
            alone = door is not None and not model.on_socket and is_local(model.source)
            seen = (tls.key, tls.certificate, tls.authority)
            start = start_in_runtime(argv, env, model, layout, log, seen, source, len(command.gpus), folders)
            wrapper = confined(isolation, isolate, model, layout, source, start, alone)
            if door is None:
                spawned = spawn(start.argv, start.env, log, wrapper)
            else:
                demand_program(start.argv, start.env)
                doorman = Doorman(inner, tls, key, model.health, model.kind.deaf_while_busy)
                spawned = spawn(*behind(doorman, start.argv, start.env), log, wrapper, door.fileno())
    except (GatewayError, OSError):
        records.remove(layout, command.engine)  # its folders
        raise
    record = EngineRecord(
        engine=command.engine,
        model=model.name,
        task=model.task,
        node=place.node,
        block=place.block,
        pid=spawned.mark.pid,
        started=spawned.mark.started,
        host=bind.host,
        port=bind.port,
        epoch=command.epoch,
        gpus=command.gpus,
        memory_mib=model.memory_mib,
        log=str(log),
        key=key,
        secrets=secrets_of(model.variables),
        ticks=spawned.mark.ticks,
        boot=spawned.mark.boot,
        remove=start.remove,
        scratch=start.scratch,
        hang_after_s=model.hang_after_s,
        sleeps=sleeps,
        bare_mib=place.bare_mib,
        sleep_mib=command.sleep_mib if sleeps else 0,
    )
    recorded = True
    try:
        records.write(layout, record)
    except OSError as error:  # a full disk: its watcher keeps trying
        logger.warning("engine not recorded engine=%s why=%s", record.engine, error)
        recorded = False
    except GatewayError:  # without a record it could not be found again
        end((*group_members(spawned.mark), *strays(str(log), spawned.mark)), grace_s=0.0)
        spawned.child.wait()
        clear_away(start.remove, start.scratch)
        records.remove(layout, command.engine)
        raise
    logger.info("engine started engine=%s model=%s pid=%d", record.engine, record.model, record.pid)
    return Launched(record, spawned.child, recorded)


def _own_folder(layout: Layout, engine: str, model: Model) -> tuple[Path, ...]:
    """The folder of its socket and its temporary files, if it needs one: a container has a ``/tmp`` of its own. Raises
    ``GatewayError``: there is none for its socket."""
    if model.contained and not model.on_socket:
        return ()
    try:
        return (records.make_engine_folder(layout, engine),)
    except GatewayError as error:  # a full disk
        if model.on_socket:
            raise
        logger.warning("engine without folder engine=%s why=%s", engine, error.message)
        return ()


def _inner(folders: tuple[Path, ...]) -> Bind:
    """Where an engine behind a doorman listens."""
    if folders:
        return Bind("127.0.0.1", 0, str(folders[0] / "e.sock"))
    return Bind("127.0.0.1", free_port("127.0.0.1"))
