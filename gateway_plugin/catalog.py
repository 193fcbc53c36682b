"""The catalog of models: ``models.yaml``, parsed once; unknown keys are refused.

Used by the service, the CLI and the Serve application, which receives the same frozen values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from gateway_plugin.catalog_words import names_of, variables_of, words_of
from gateway_plugin.engine_options import refusal, requests_at_a_time
from gateway_plugin.errors import ConfigError, ModelNotFound

MODEL_NAME = re.compile(r"(?=[0-9._/:@+-]*[A-Za-z])[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,127}")
"""Allowed names of a model: safe in the edge's maps and on its socket, whose commands are separated by ``;``. One
letter is required: a number in a body (``"model": 5``) is no name, and the edge would read it as one."""

LOCAL_SOURCES = ("prepared:", "/", "~", ".")
"""Prefixes of a ``source`` on this machine's disk."""

_REQUESTS_GUESS = 256
"""Requests at a time of an engine that does not say it."""
CONCURRENCY_MAX = 10_000
"""The edge tells an engine's places from those of the ingress by their number (``gateway_plugin.edge.floods``)."""

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration_s(value: object) -> float:
    """Seconds of ``90``, ``"90s"``, ``"10m"`` or ``"1h30m"``; ``-1`` stands for "for ever". Raises ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a duration such as 90, '10m' or -1, got {value!r}")
    if isinstance(value, int | float):
        seconds = float(value)
    else:
        text = value.strip()
        try:
            seconds = float(text)
        except ValueError:
            if not text or _DURATION.sub("", text):
                raise ValueError(f"expected a duration such as 90, '10m' or -1, got {value!r}") from None
            seconds = sum(float(n) * _UNIT_S[unit] for n, unit in _DURATION.findall(text))
    if seconds < 0 and seconds != -1:
        raise ValueError(f"a duration is 0 or more, or -1 for 'for ever', got {value!r}")
    if seconds != seconds or seconds == float("inf"):
        raise ValueError(f"a duration is a finite number of seconds, got {value!r}")
    return seconds


def _number(value: object) -> object:
    """Refuse YAML's ``true``, which Python takes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value!r}")
    return value


def _gib(value: object) -> object:
    """Raises ``ValueError`` for a text with a unit, which would have to be guessed."""
    if isinstance(value, str) and not re.fullmatch(r"\s*[0-9.eE+-]+\s*", value):
        raise ValueError(f"expected GiB as a number, such as 24 or 2.8, got {value!r}")
    return _number(value)


Duration = Annotated[float, BeforeValidator(parse_duration_s)]
Words = Annotated[tuple[str, ...], BeforeValidator(words_of)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Frozen):
    """One catalog entry: where the weights are, what they need, how long to keep them."""

    name: str
    source: str
    """``prepared:NAME`` (built by ``gateway models prepare``), a local folder, or a hub repository: ``org/name``, or
    ``org/name@REVISION`` (a commit's hash, a tag or a branch)."""
    task: Literal["generate", "embed"] = "generate"
    aliases: Annotated[tuple[str, ...], BeforeValidator(names_of)] = ()
    engine: Literal["vllm", "command"] = "vllm"
    command: Words = ()
    """For ``engine: command``: argv of an OpenAI-compatible server; see ``serve.agent.argv`` for the placeholders."""
    args: Words = ()
    """Further arguments for vLLM."""
    env: Annotated[dict[str, str], BeforeValidator(variables_of)] = Field(default_factory=dict)
    isolated: bool = True
    """``False``: its engines see all your files, for any setting of the site. For programs that cannot be isolated."""
    gpus: Annotated[int, BeforeValidator(_number)] = Field(default=0, ge=0, le=64)
    memory_gib: Annotated[float, BeforeValidator(_gib)] = Field(gt=0, le=100_000)
    """Per GPU when ``gpus`` > 0, else of the node's engine memory."""
    sleep: bool | None = None
    """Its engines may sleep in host memory; ``None``: where the gateway's vLLM has GPUs (``sleeps``)."""
    replicas_max: Annotated[int, BeforeValidator(_number)] = Field(default=1, ge=1, le=8)
    target_in_flight: Annotated[int | None, BeforeValidator(_number)] = Field(default=None, ge=1, le=100_000)
    """Requests per engine above which one more is started; see ``replica_target``."""
    concurrency: Annotated[int | None, BeforeValidator(_number)] = Field(default=None, ge=1, le=CONCURRENCY_MAX)
    """Requests that one engine is sent at a time; more wait at the edge. ``None``: see ``requests_at_a_time``."""
    pinned: bool = False
    keep_alive_s: Duration = Field(default=-1.0, alias="keep_alive")
    """Unload after this time without a request, even if no model needs the room. ``-1``: never. ``0``: at once."""
    min_residency_s: Duration = Field(default=0.0, alias="min_residency")
    load_timeout_s: Duration = Field(default=900.0, alias="load_timeout")
    drain_timeout_s: Duration = Field(default=600.0, alias="drain_timeout")
    hang_after_s: Duration = Field(default=300.0, alias="hang_after")
    """End an engine that makes no progress for this long with requests in flight: longer than its longest prompt takes
    until the first token. ``0``: never."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("name", "aliases")
    @classmethod
    def _safe_name(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
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
    def _sleeps_on_gpus(self) -> Model:
        if self.sleep and not self.gpus:
            raise ValueError("'sleep: true' needs 'gpus': only the memory of GPUs is freed by sleep")
        return self

    @property
    def memory_mib(self) -> int:
        """Memory in whole MiB, per GPU when ``gpus`` > 0."""
        return max(1, round(self.memory_gib * 1024))

    @property
    def sleeps(self) -> bool:
        """Whether its engines are started so that they can be put to sleep."""
        return self.gpus > 0 and (self.engine == "vllm" if self.sleep is None else self.sleep)

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
        """The name and every alias."""
        return (self.name, *self.aliases)


class Catalog(_Frozen):
    """Every model that the gateway may load."""

    models: tuple[Model, ...]

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


def parse_catalog(document: object, origin: str, *, in_force: bool = False) -> Catalog:
    """The catalog in a parsed YAML document ``{"models": {NAME: {...}}}``.

    Args:
        in_force: it was accepted before, maybe by an earlier version: its engine options are not checked again.

    Raises:
        ConfigError: one line that names ``origin``, the key and what was expected.
    """
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict):
        raise ConfigError(f"{origin}: models: expected a mapping of model names to entries")
    unknown = sorted(str(key) for key in document if key != "models")
    if unknown:
        raise ConfigError(f"{origin}: {unknown[0]}: unknown key; expected only 'models'")
    entries: list[dict[str, Any]] = []
    for name, entry in document["models"].items():
        if not isinstance(name, str):
            raise ConfigError(f"{origin}: models: {name!r}: a model's name is text; write it in quotes")
        if not isinstance(entry, dict):
            raise ConfigError(f"{origin}: models.{name}: expected a mapping such as 'source: ...'")
        if "name" in entry:
            raise ConfigError(f"{origin}: models.{name}.name: unknown key; the name is the entry's own key")
        entries.append({"name": name, **entry})
    try:
        catalog = Catalog.model_validate({"models": entries})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_first_problem(error, entries)}") from None
    for model in () if in_force else catalog.models:
        wrong = refusal(model)
        if wrong is not None:
            raise ConfigError(f"{origin}: models.{model.name}.{wrong[0]}: {wrong[1]}")
    return catalog


def _first_problem(error: ValidationError, entries: list[dict[str, Any]]) -> str:
    # a misspelt key is reported before the required one that is missing because of it
    problem = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")[0]
    path = list(problem["loc"])
    if len(path) >= 2 and path[0] == "models" and isinstance(path[1], int):
        path[1] = entries[path[1]]["name"]
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        what = f"unknown key; expected one of {', '.join(sorted(_keys()))}"
    key = ".".join(str(part) for part in path) or "models"
    return f"{key}: {what}"


def _keys() -> set[str]:
    return {field.alias or name for name, field in Model.model_fields.items()} - {"name"}


class _AsWritten(yaml.SafeLoader):
    """YAML that keeps numbers and dates as written, and refuses a mapping with the same key twice.

    YAML reads ``010`` as 8 and ``1.10`` as 1.1; values in ``args`` and ``env`` are text, and numbers are parsed where
    one is expected. Of two entries with one name the first would be lost silently.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As the parent's; raises ``ComposerError`` for a duplicate key."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in lines:
                said = f"'{key.value}' is there twice, first in line {lines[key.value]}"
                raise yaml.composer.ComposerError(None, None, said, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


_AsWritten.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _AsWritten.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def load_catalog(path: Path) -> Catalog:
    """The catalog in the YAML file ``path``. Raises ``ConfigError``."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_AsWritten)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}: is not valid YAML{where}: {first}") from None
    return parse_catalog(document, str(path))


def catalog_document(catalog: Catalog) -> dict[str, Any]:
    """The catalog as ``parse_catalog`` reads it, ready for JSON: ``{"models": {NAME: {...}}}``."""
    entries = {
        model.name: model.model_dump(mode="json", by_alias=True, exclude={"name"}, exclude_defaults=True)
        for model in catalog.models
    }
    return {"models": entries}
