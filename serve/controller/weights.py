"""Looks whether weights from the hub are on disk, and fetches them where the site says so; reports both to the core.

A fetch is a process of its own (``gateway_plugin.fetch_process``), which ends with its standard input: with the
controller, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from gateway_plugin.weights import is_local, needs_source, resolve, split_revision
from serve.controller.observer import Known
from serve.core.events import Event, WeightsFetching, WeightsMissing, WeightsThere

log = logging.getLogger("gateway.controller")

_LOOK_S = 20.0
"""Interval of looks at weights that were there."""
_CATALOG_S, _CATALOG_LOOKS = 0.1, 10
"""Another catalog is noticed after a tenth of a second, weights that come after one."""
_AGAIN_S = 1.0
"""Interval of looks while a fetch that failed is not tried again."""
_AT_A_TIME = 2
"""Fetches at a time: more would only share the line."""
_REPORT_S = 2.0
_RATE_OVER_S = 20.0
_RETRY_FIRST_S = 60.0
_RETRY_MAX_S = 3600.0
_FETCH = (sys.executable, "-m", "gateway_plugin.fetch_process")


class WeightsPlace(NamedTuple):
    """``Site.fetch``, and where weights from the hub lie."""

    fetch: Literal["by-command", "on-request", "by-engine"]
    folder: Path


UNWATCHED = WeightsPlace("by-engine", Path())
"""Engines load from the hub: nothing is watched."""


class WeightsWatch:
    """Watches the weights of every model with a hub source."""

    def __init__(
        self, known: Known, post: Callable[[Event], None], place: WeightsPlace, program: tuple[str, ...] = _FETCH
    ) -> None:
        self._known = known
        self._post = post
        self._folder = None if place.fetch == "by-engine" else place.folder
        self._on_request = place.fetch == "on-request"
        self._program = program
        self._seen: dict[str, tuple[Model, str]] = {}
        """Model -> its entry, and what is missing (``""``: nothing), as last reported."""
        self._fetches: dict[str, asyncio.Task[None]] = {}
        """Model -> its fetch, and the wait after one that failed."""
        self._fetching: dict[str, Model] = {}
        """Their entries when they began."""
        self._failures: dict[str, int] = {}
        self._turns = asyncio.Semaphore(_AT_A_TIME)

    async def watch(self) -> None:
        """Report what is missing, on every change, without end."""
        loop = asyncio.get_running_loop()
        models, looked = None, 0.0
        while self._folder is not None:
            if self._known.fleet.models is not models or loop.time() >= looked + _LOOK_S:
                models, looked = self._known.fleet.models, loop.time()
                await self.look()
            else:
                await self.look(self.missing())
            for _ in range(_CATALOG_LOOKS):
                await asyncio.sleep(_CATALOG_S)
                if self._known.fleet.models is not models:
                    break

    def missing(self) -> frozenset[str]:
        """The models whose weights were missing when they were looked at last."""
        return frozenset(name for name, (_, missing) in self._seen.items() if missing)

    async def look(self, names: frozenset[str] | None = None) -> None:
        """Look once at what is not being fetched: at models called ``names`` (``None``: all). Fetches of sources that
        the catalog does not have any more are ended."""
        await self._end_outdated()
        models = [
            model for model in self._known.fleet.models.values()
            if (names is None or model.name in names)
            and not is_local(model.source) and needs_source(model) and model.name not in self._fetches
        ]  # fmt: skip
        found = await asyncio.to_thread(lambda: {model.name: self._missing(model) for model in models})
        for name in self._seen.keys() - self._known.fleet.models.keys():
            del self._seen[name]
        for model in models:
            before, was = self._seen.get(model.name, (model, ""))
            missing = found[model.name]
            if model.name in self._fetches:
                continue
            self._seen[model.name] = (model, missing)
            if missing != was or (missing and model != before):  # of an entry that changes the core knows nothing
                self._report(model, missing)

    async def _end_outdated(self) -> None:
        models = self._known.fleet.models
        over = [name for name, was in self._fetching.items() if name not in models or models[name].source != was.source]
        tasks = [self._fetches[name] for name in over]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name in over:
            self._forget(name)  # a task cancelled before its first step does not
            log.info("fetch-ended", extra={"model": name, "why": "another catalog"})
            self._seen.pop(name, None)
            self._failures.pop(name, None)
            self._post(WeightsThere(name))  # as far as is known, until it is looked at

    def _forget(self, name: str) -> None:
        self._fetches.pop(name, None)
        self._fetching.pop(name, None)

    def fetch(self, model: Model) -> None:
        """Begin to fetch the weights of ``model``, unless that is under way."""
        if model.name not in self._fetches and self._folder is not None:
            self._fetching[model.name] = model
            self._fetches[model.name] = asyncio.create_task(self._fetch(model, self._folder))

    def _missing(self, model: Model) -> str:
        try:
            resolve(model, fetched=self._folder)
        except (ConfigError, OSError) as error:
            return str(error).removeprefix(f"models.{model.name}.source: ")
        return ""

    def _report(self, model: Model, missing: str) -> None:
        log.info("weights", extra={"model": model.name, "missing": missing})
        if not missing:
            self._post(WeightsThere(model.name))
            return
        reason = "its weights are not on this site's disk"
        reason += "" if self._on_request else f": an administrator runs 'gateway models fetch {model.name}'"
        self._post(WeightsMissing(model.name, reason, missing, may_fetch=self._on_request))

    async def _fetch(self, model: Model, folder: Path) -> None:
        try:
            async with self._turns:
                try:
                    error = await self._run(model, folder)
                except (OSError, ValueError) as failure:  # no more processes, say
                    error = f"the fetch could not be run: {failure}"
            if error:
                await self._wait_after(model, error)
            else:
                self._failures.pop(model.name, None)
            self._seen.pop(model.name, None)
            now = self._known.fleet.models.get(model.name)
            if now is None or is_local(now.source) or not needs_source(now):  # by another catalog
                self._post(WeightsThere(model.name))
                return
            missing = await asyncio.to_thread(self._missing, now)
            self._seen[model.name] = (now, missing)
            self._report(now, missing)
        finally:
            self._forget(model.name)

    async def _wait_after(self, model: Model, error: str) -> None:
        """Refuse the model for a while, twice as long after each failure in a row; no longer once another catalog has
        another source, or the weights have come by a command."""
        failures = self._failures[model.name] = self._failures.get(model.name, 0) + 1
        pause_s = min(_RETRY_MAX_S, _RETRY_FIRST_S * 2.0 ** (failures - 1))
        log.warning("fetch-failed", extra={"model": model.name, "error": error, "retry_s": pause_s})
        again = f"it is tried again for requests that come after {pause_s:.0f} s"
        public = f"its weights could not be fetched from the hub; {again}"
        refused = WeightsMissing(model.name, public, f"its weights could not be fetched: {error} ({again})")
        told: Model | None = None
        loop = asyncio.get_running_loop()
        over = loop.time() + pause_s
        while (left := over - loop.time()) > 0:
            now = self._known.fleet.models.get(model.name)
            if now is not None and now != told:  # of an entry that changes the core knows nothing
                told = now
                self._post(refused)
            await asyncio.sleep(min(_AGAIN_S, left))
            now = self._known.fleet.models.get(model.name)
            if now is None or now.source != model.source or not await asyncio.to_thread(self._missing, now):
                self._failures.pop(model.name, None)
                return

    async def _run(self, model: Model, folder: Path) -> str:
        """Run one fetch; why it failed, ``""``: it did not."""
        repository, revision = split_revision(model.source)
        process = await asyncio.create_subprocess_exec(
            *self._program, repository, revision, str(folder),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        log.info("fetch-started", extra={"model": model.name, "pid": process.pid})
        assert process.stdout is not None, "it is a pipe"
        error, told = "", 0.0
        seen: deque[tuple[float, int]] = deque()
        loop = asyncio.get_running_loop()
        try:
            async for line in process.stdout:
                said = json.loads(line)
                if "error" in said:
                    error = str(said["error"])
                    continue
                now, done = loop.time(), int(said["done_bytes"])
                seen.append((now, done))
                while now - seen[0][0] > _RATE_OVER_S:
                    seen.popleft()
                if now >= told + _REPORT_S:
                    told = now
                    seconds = now - seen[0][0]
                    rate = (done - seen[0][1]) / seconds if seconds > 0 else 0.0
                    self._post(WeightsFetching(model.name, done, int(said["total_bytes"]), max(0.0, rate)))
        except BaseException:  # not at its normal end: the signal would reap it, and its exit code be lost
            with suppress(ProcessLookupError):
                process.kill()
            raise
        code = await process.wait()
        return error or ("" if code == 0 else f"the fetch ended with exit code {code}")
