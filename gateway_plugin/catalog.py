"""The catalog of models: ``models.yaml``, parsed once; unknown keys are refused.

Used by the service, the CLI and the Serve application, which receives the same frozen values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from gateway_plugin.adapters import adapters_of, adapters_refusal
from gateway_plugin.catalog_values import Frozen, gib, matching, number, parse_duration_s
from gateway_plugin.catalog_words import names_of, variables_of, words_of
from gateway_plugin.catalog_yaml import read_yaml
from gateway_plugin.engine_kinds import KINDS, Engine, EngineKind, Task, on_socket, serves_tls
from gateway_plugin.engine_options import refusal, requests_at_a_time
from gateway_plugin.errors import ConfigError, ModelNotFound
from gateway_plugin.runtimes import Container, Runtime

MODEL_NAME = re.compile(r"(?=[0-9._/:@+-]*[A-Za-z])[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,127}")
"""Allowed names of a model: safe in the edge's maps and on its socket, whose commands are separated by ``;``. One
letter is required: a number in a body (``"model": 5``) is no name, and the edge would read it as one."""

LOCAL_SOURCES = ("prepared:", "/", "~", ".")
"""Prefixes of a ``source`` on this machine's disk."""

_WHISPER_HANG_AFTER_S = 1800.0
_REQUESTS_GUESS = 256
"""Requests at a time of an engine that does not say it."""
CONCURRENCY_MAX = 10_000
"""The edge tells an engine's places from those of the ingress by their number (``gateway_plugin.edge.floods``)."""

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,127}")


Duration = Annotated[float, BeforeValidator(parse_duration_s)]
Words = Annotated[tuple[str, ...], BeforeValidator(words_of)]


class Model(Frozen, populate_by_name=True):
    """One catalog entry: where the weights are, what they need, how long to keep them."""

    name: str
    source: str
    """``prepared:NAME`` (built by ``gateway models prepare``), a local folder, or a hub repository: ``org/name``, or
    ``org/name@REVISION`` (a commit's hash, a tag or a branch)."""
    task: Task = "generate"
    aliases: Annotated[tuple[str, ...], BeforeValidator(names_of)] = ()
    adapters: Annotated[dict[str, str] | None, BeforeValidator(adapters_of)] = None
    """LoRA adapters of this base, name -> folder: names that its engines answer to as well. Empty: none yet."""
    engine: Engine = "vllm"
    runtime: Runtime | None = None
    """What its engines run in: by its name in the file, one of ``runtimes``. ``None``: the gateway's environment."""
    command: Words = ()
    """For ``engine: command``: argv of an OpenAI-compatible server; see ``serve.agent.argv`` for the placeholders."""
    args: Words = ()
    """Further arguments for the engine."""
    health: Annotated[str, matching(_PATH, "expected a path such as /health or /v1/models")] = "/health"
    """Path that answers 200 once the engine is loaded; another one only for a program that serves no TLS itself."""
    env: Annotated[dict[str, str], BeforeValidator(variables_of)] = Field(default_factory=dict)
    isolated: bool = True
    """``False``: its engines see all your files, for any setting of the site. For programs that cannot be isolated."""
    gpus: Annotated[int, BeforeValidator(number)] = Field(default=0, ge=0, le=64)
    memory_gib: Annotated[float, BeforeValidator(gib)] = Field(default=0.0, ge=0, le=100_000)
    """Per GPU when ``gpus`` > 0, else of the node's engine memory. 0 (``auto`` in the file, or left out): not worked
    out yet (``gateway_plugin.sizing.catalog_file``); no catalog in force has it."""
    predicted_gib: float | None = Field(default=None, gt=0)
    """``memory_gib`` as it was worked out; it is raised if an engine is seen to take more. ``None``: the user's own."""
    sleep: bool | None = None
    """Its engines may sleep in host memory; ``None``: where the gateway's vLLM has GPUs (``sleeps``)."""
    replicas_max: Annotated[int, BeforeValidator(number)] = Field(default=1, ge=1, le=8)
    target_in_flight: Annotated[int | None, BeforeValidator(number)] = Field(default=None, ge=1, le=100_000)
    """Requests per engine above which one more is started; see ``replica_target``."""
    concurrency: Annotated[int | None, BeforeValidator(number)] = Field(default=None, ge=1, le=CONCURRENCY_MAX)
    """Requests that one engine is sent at a time; more wait at the edge. ``None``: see ``requests_at_a_time``."""
    pinned: bool = False
    keep_alive_s: Duration = Field(default=-1.0, alias="keep_alive")
    """Unload after this time without a request, even if no model needs the room. ``-1``: never. ``0``: at once."""
    group: Annotated[str, Field(max_length=64)] = ""
    """Models of one group are used together by workflows: while one is asked, the others give their room up last."""
    min_residency_s: Duration = Field(default=0.0, alias="min_residency")
    load_timeout_s: Duration = Field(default=900.0, alias="load_timeout")
    drain_timeout_s: Duration = Field(default=600.0, alias="drain_timeout")
    hang_after_s: Duration = Field(default=300.0, alias="hang_after")
    """End an engine that makes no progress for this long with requests in flight: longer than its longest prompt takes
    until the first token. ``0``: never. With ``engine: whisper`` 30 minutes, unless given."""

    @field_validator("name", "aliases", "adapters")
    @classmethod
    def _safe_name(cls, value: Any) -> Any:
        for name in (value,) if isinstance(value, str) else value or ():
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"a model name matches {MODEL_NAME.pattern}, got {name!r}")
        return value

    @field_validator("source")
    @classmethod
    def _whole_source(cls, value: str) -> str:
        name, at, revision = value.partition("@")
        if not value.startswith(LOCAL_SOURCES) and at and not (name and _REVISION.fullmatch(revision)):
            raise ValueError(f"a hub source is 'org/name' or 'org/name@REVISION', got {value!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _whisper_is_silent(cls, entry: Any) -> Any:
        """It answers nothing at all while it transcribes, which may take long on CPUs."""
        said = isinstance(entry, dict) and entry.get("engine") == "whisper"
        return {"hang_after": _WHISPER_HANG_AFTER_S, **entry} if said and "hang_after_s" not in entry else entry

    @field_validator("hang_after_s")
    @classmethod
    def _hang_in_bounds(cls, value: float) -> float:
        if value != 0 and not 1 <= value <= 86_400:
            raise ValueError(f"expected 1 s to 24 h, or 0 for 'never ended', got {value:g}")
        return value

    @field_validator("load_timeout_s", "drain_timeout_s", "min_residency_s")
    @classmethod
    def _finite(cls, value: float) -> float:
        if value < 0:
            raise ValueError("-1 ('for ever') is not possible here")
        return value

    @model_validator(mode="after")
    def _command_fits_engine(self) -> Model:
        if (self.engine == "command") != bool(self.command):
            raise ValueError("'command' is given exactly when 'engine: command' is")
        return self

    @model_validator(mode="after")
    def _health_is_the_doormans(self) -> Model:
        if self.health != "/health" and not self.behind_doorman:
            raise ValueError("the edge asks '/health' of an engine that serves TLS itself; leave it out")
        return self

    @model_validator(mode="after")
    def _sleeps_on_gpus(self) -> Model:
        if self.sleep and not self.gpus:
            raise ValueError("'sleep: true' needs 'gpus': only the memory of GPUs is freed by sleep")
        if self.sleep and not self.kind.sleeps and self.engine != "command":
            raise ValueError(f"'sleep: true': 'engine: {self.engine}' cannot sleep; leave it out")
        return self

    @property
    def kind(self) -> EngineKind:
        """The program of its engines."""
        return KINDS[self.engine]

    @property
    def behind_doorman(self) -> bool:
        """Whether its engines serve no mutual TLS themselves (``serve.agent.doorman``)."""
        return not serves_tls(self.engine, self.command)

    @property
    def on_socket(self) -> bool:
        """Whether its engines listen on a Unix socket, for their doorman alone."""
        return on_socket(self.engine, self.command)

    @property
    def contained(self) -> bool:
        """Whether its engines run in containers."""
        return self.runtime is not None and self.runtime.container is not None

    @property
    def variables(self) -> dict[str, str]:
        """Variables that the catalog gives its engines: those of the runtime, and its own."""
        return {**(self.runtime.env if self.runtime else {}), **self.env}

    @property
    def memory_mib(self) -> int:
        """Memory in whole MiB, per GPU when ``gpus`` > 0."""
        return max(1, round(self.memory_gib * 1024))

    @property
    def sleeps(self) -> bool:
        """Whether its engines are started so that they can be put to sleep."""
        return self.gpus > 0 and (self.kind.sleeps if self.sleep is None else self.sleep)

    @property
    def replica_target(self) -> float:
        """``target_in_flight``, else three quarters of what an engine takes at a time."""
        if self.target_in_flight is not None:
            return float(self.target_in_flight)
        return max(1.0, 0.75 * (self.requests_at_a_time or _REQUESTS_GUESS))

    @property
    def requests_at_a_time(self) -> int:
        """How many requests the edge sends to one engine at a time: (1) ``concurrency``; (2) as its options say, or
        vLLM's default; (3) 0 if not known: no limit."""
        return self.concurrency or min(requests_at_a_time(self) or 0, CONCURRENCY_MAX)

    @property
    def names(self) -> tuple[str, ...]:
        """The name, every alias and every adapter."""
        return (self.name, *self.aliases, *(self.adapters or ()))


class Catalog(Frozen):
    """Every model that the gateway may load."""

    models: tuple[Model, ...]
    runtimes: tuple[Runtime, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Catalog:
        seen: dict[str, str] = {}
        for model in self.models:
            for name in model.names:
                if name in seen:
                    raise ValueError(f"the name '{name}' of model '{model.name}' is taken by model '{seen[name]}'")
                seen[name] = model.name
        return self

    def find(self, name: str) -> Model:
        """The model with this name or alias. Raises ``ModelNotFound``."""
        for model in self.models:
            if name in model.names:
                return model
        raise ModelNotFound(name, tuple(model.name for model in self.models))


def parse_catalog(document: object, origin: str, *, in_force: bool = False, unsized: bool = False) -> Catalog:
    """The catalog in a parsed YAML document ``{"models": {NAME: {...}}, "runtimes": {NAME: {...}}}``.

    Args:
        in_force: it was accepted before, maybe by an earlier version: its engine options are not checked again.
        unsized: entries may leave ``memory_gib`` to be worked out.

    Raises:
        ConfigError: one line that names ``origin``, the key and what was expected.
    """
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict):
        raise ConfigError(f"{origin}: models: expected a mapping of model names to entries")
    unknown = sorted(str(key) for key in document if key not in ("models", "runtimes"))
    if unknown:
        raise ConfigError(f"{origin}: {unknown[0]}: unknown key; expected 'models' or 'runtimes'")
    runtimes = _catalog("runtimes", _entries(document.get("runtimes", {}), origin, "runtimes"), origin).runtimes
    by_name = {runtime.name: runtime for runtime in runtimes}
    entries = _entries(document["models"], origin, "models")
    for entry in entries:
        if (name := entry.get("runtime")) is None:
            continue
        if not isinstance(name, str) or name not in by_name:
            known = ", ".join(by_name) or "there are none: 'runtimes' is beside 'models'"
            raise ConfigError(f"{origin}: models.{entry['name']}.runtime: no runtime {name!r}; known: {known}")
        entry["runtime"] = by_name[name]
    catalog = _catalog("models", entries, origin).model_copy(update={"runtimes": runtimes})
    for model in () if in_force else catalog.models:
        wrong = refusal(model) or adapters_refusal(model)
        if wrong is not None:
            raise ConfigError(f"{origin}: models.{model.name}.{wrong[0]}: {wrong[1]}")
    for model in () if unsized else catalog.models:
        if not model.memory_gib:
            raise ConfigError(f"{origin}: models.{model.name}.memory_gib: expected GiB as a number, such as 24 or 2.8")
    return catalog


def _entries(found: object, origin: str, key: str) -> list[dict[str, Any]]:
    """The entries of ``models`` or ``runtimes``, each with its name. Raises ``ConfigError``."""
    if not isinstance(found, dict):
        raise ConfigError(f"{origin}: {key}: expected a mapping of names to entries")
    entries: list[dict[str, Any]] = []
    for name, entry in found.items():
        if not isinstance(name, str):
            raise ConfigError(f"{origin}: {key}: {name!r}: a {key[:-1]}'s name is text; write it in quotes")
        if not isinstance(entry, dict):
            such_as = "source: ..." if key == "models" else "python: /sw/env/bin/python"
            raise ConfigError(f"{origin}: {key}.{name}: expected a mapping such as '{such_as}'")
        if "name" in entry:
            raise ConfigError(f"{origin}: {key}.{name}.name: unknown key; the name is the entry's own key")
        entries.append({"name": name, **entry})
    return entries


def _catalog(key: str, entries: list[dict[str, Any]], origin: str) -> Catalog:
    """A catalog of these ``models`` or ``runtimes``. Raises ``ConfigError``."""
    try:
        return Catalog.model_validate({"models": (), key: entries})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_first_problem(error, entries)}") from None


def _first_problem(error: ValidationError, entries: list[dict[str, Any]]) -> str:
    # a misspelt key is reported before the required one that is missing because of it
    problem = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")[0]
    path = list(problem["loc"])
    if len(path) >= 2 and isinstance(path[1], int):
        path[1] = entries[path[1]]["name"]
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        what = f"unknown key; expected one of {', '.join(sorted(_keys(path)))}"
    key = ".".join(str(part) for part in path) or "models"
    return f"{key}: {what}"


def _keys(path: Sequence[object]) -> set[str]:
    """The keys of the mapping in which the last one of ``path`` is unknown."""
    of = Model if path[0] == "models" else Container if "container" in path[2:-1] else Runtime
    return {field.alias or name for name, field in of.model_fields.items()} - {"name"}


def load_catalog(path: Path, *, unsized: bool = False) -> Catalog:
    """The catalog in the YAML file ``path``. Raises ``ConfigError``. ``unsized``: as for ``parse_catalog``; what is to
    be put in force is read by ``gateway_plugin.sizing.catalog_file.read_catalog``."""
    return parse_catalog(read_yaml(path), str(path), unsized=unsized)


def catalog_document(catalog: Catalog) -> dict[str, Any]:
    """The catalog as ``parse_catalog`` reads it, ready for JSON: ``{"models": {NAME: {...}}}``, and ``runtimes``."""

    def entry(of: Model | Runtime) -> dict[str, Any]:
        return of.model_dump(mode="json", by_alias=True, exclude={"name"}, exclude_defaults=True)

    models = {model.name: entry(model) for model in catalog.models}
    for model in catalog.models:
        if model.runtime is not None:
            models[model.name]["runtime"] = model.runtime.name
    runtimes = {runtime.name: entry(runtime) for runtime in catalog.runtimes}
    return {"models": models, **({"runtimes": runtimes} if runtimes else {})}
