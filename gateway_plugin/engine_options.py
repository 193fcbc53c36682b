"""Which engine options a catalog entry may set, and which are reserved for the gateway. Pure.

An option that is reserved (``engine_reserved``) is refused in every spelling that the engine's parser accepts; vLLM's:
``--served_model_name``, ``--port=1``, prefixes such as ``--served``, and short ones such as ``-tp``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from gateway_plugin.catalog_words import as_yaml, no_scripts, not_filled_in, one_word_each
from gateway_plugin.engine_kinds import KINDS, TASKS, Engine, Task, on_socket, serves_tls
from gateway_plugin.engine_reserved import reserved_words
from gateway_plugin.option_values import value_of

_TAKEN_VARIABLES = {
    "VLLM_API_KEY": "the gateway gives it itself",
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "the gateway chooses GPUs; say gpus:"
    ),
}
_ACTIVE = ("max-num-active-seqs", "max-num-active-seq", "max-num-active")
"""With prefixes that vLLM's parser takes for it."""
_SEQUENCES_GPU, _SEQUENCES_CPU = 256, 128
"""Defaults of vLLM 0.32 as an API server (``EngineArgs.get_batch_defaults``). On a GPU of 70 GiB and more, an A100
excepted, it takes 1,024. Which GPU it will be is not known here, and what is over its own limit would queue in it."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_POOLS = re.compile(r"--(?:runner[= ]pooling|convert[= ]embed|task[= ]embed(?:ding)?)\b")
"""Options of an engine that makes vectors; ``--task`` is an earlier vLLM's."""
_PLACEHOLDERS = frozenset(
    {"host", "port", "socket", "name", "model", "names", "source", "revision"}
    | {"adapters", "keyfile", "certfile", "cafile", "python"}
)
"""Placeholders of ``command``; see ``serve.agent.argv``."""
_BRACED = re.compile(r"(?<![{$])\{([A-Za-z_]+)\}(?!\})")
_ADDRESS = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+).*|https?://.*")


class Entry(Protocol):
    """The fields of a catalog entry that are checked (``gateway_plugin.catalog.Model``)."""

    name: str
    aliases: tuple[str, ...]
    adapters: dict[str, str] | None
    source: str
    task: Task
    engine: Engine
    command: tuple[str, ...]
    args: tuple[str, ...]
    env: dict[str, str]
    gpus: int


def refusal(entry: Entry) -> tuple[str, str] | None:
    """The first invalid key of an entry, and why; ``None``: all are valid.

    (1) Malformed arguments. (2) An engine's options that are the gateway's, or another task's; a task that it does not
    serve. (3) Adapters that no request could name. (4) Variables that are the gateway's, or invalid. (5) Shell
    expansions: no shell reads a catalog (a command may be one). (6) A command without a place to listen at. (7) An
    invalid source.
    """
    for key, words in (("args", entry.args), ("command", tuple(no_scripts(entry.command)))):  # (1)
        if wrong := one_word_each(words):
            return key, wrong
    if said := reserved_words(entry.engine, entry.args, entry.gpus) or _other_task(entry):  # (2)
        return "args", said
    if entry.task not in (tasks := KINDS[entry.engine].tasks):
        able = ", ".join(task for task in TASKS if task in tasks)
        return "task", f"'engine: {entry.engine}' does not serve '{entry.task}'; it serves {able}"
    if unreachable := _unreachable(entry):  # (3)
        return unreachable
    for name in entry.env:  # (4)
        if wrong := refused_variable(name):
            return "env", wrong
    for key, text in _texts(entry):  # (5)
        if "\0" in text:
            return key, f"{text!r}: no text may have a NUL in it"
    for key, text in _texts(entry, scripts=False):
        if wrong := not_filled_in(text.removeprefix("~") if key == "source" else text):
            return key, wrong
    if entry.engine == "command" and (deaf := _deaf(entry)):  # (6)
        return deaf
    return _no_source(entry)  # (7)


def refused_variable(name: str) -> str:
    """Why no ``env`` may have this variable; ``""`` if it may."""
    if name in _TAKEN_VARIABLES:
        return f"{name}: {_TAKEN_VARIABLES[name]}"
    return "" if _VARIABLE.fullmatch(name) else f"{name!r}: expected the name of an environment variable"


def _texts(entry: Entry, scripts: bool = True) -> Iterator[tuple[str, str]]:
    yield "source", entry.source
    yield from (("command", word) for word in (entry.command if scripts else no_scripts(entry.command)))
    yield from (("args", word) for word in entry.args)
    yield from ((f"env.{name}", setting) for name, setting in entry.env.items())


def _other_task(entry: Entry) -> str:
    found = _POOLS.search(" ".join(entry.args))
    if found is None or entry.engine != "vllm" or entry.task != "generate":
        return ""
    return f"{found[0].replace('=', ' ').partition(' ')[0]}: an engine that makes vectors; say task: embed"


def adapters(words: Sequence[str]) -> tuple[str, ...]:
    """Names of the LoRA adapters that vLLM with these arguments loads beside its base (``--lora-modules``)."""
    return tuple(name for option in _lora_options(words) for name in option)


def requests_at_a_time(entry: Entry) -> int | None:
    """How many requests an engine works on at a time: (1) as its option says (``--max-num-seqs`` for vLLM), the last
    one, as parsers read it, else its default; (2) ``None``: not known; (3) vLLM's ``--max-num-active-seqs`` lowers it.
    """
    kind = KINDS[entry.engine]
    words = (*entry.command, *entry.args)
    default = kind.at_a_time_default
    if entry.engine == "vllm":
        default = _SEQUENCES_GPU if entry.gpus else _SEQUENCES_CPU
    if entry.engine == "transformers" and "--continuous-batching" in words:
        default = None
    taken = _last_number(words, kind.at_a_time) or default  # (1), (2)
    active = _last_number(words, _ACTIVE)
    return active if taken is None else min(taken, active or taken)  # (3)


def _last_number(words: Sequence[str], options: Sequence[str]) -> int | None:
    """The value of the last of these options, if it is a positive number."""
    value = value_of(words, *options) or ""
    return int(value) if re.fullmatch(r"0*[1-9][0-9]{0,9}", value, re.ASCII) else None


def _lora_options(words: Sequence[str]) -> list[list[str]]:
    """The adapters' names for each time that the option is given; other values are left to vLLM."""
    found: list[list[str]] = []
    taking = False
    for word in words:
        option, given, value = word.partition("=")
        if option.startswith("--"):
            taking = option.replace("_", "-") == "--lora-modules"
            if taking:
                found.append([])
            word = value if given else ""
        if taking and word:
            found[-1] += _adapter(word)
    return found


def _adapter(word: str) -> list[str]:
    """From ``name=path``, or a JSON object with ``name``."""
    if "=" in word and "," not in word:
        return [word.partition("=")[0]]
    try:
        name = json.loads(word)["name"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return [str(name)]


def _unreachable(entry: Entry) -> tuple[str, str] | None:
    words = entry.args if entry.engine == "vllm" else (*entry.command, *entry.args)
    options = _lora_options(words)
    if len(options) > 1:
        return "args", "--lora-modules: of two, vLLM takes the later; name all adapters after one"
    names = adapters(words)
    if entry.name in names:
        return "args", f"--lora-modules: '{entry.name}' is the base's name; give the adapter another one"
    if missing := [name for name in names if name not in entry.aliases]:
        aliases = as_yaml([*entry.aliases, *missing])
        return "aliases", f"the adapter {', '.join(missing)} of --lora-modules is not among them; expected {aliases}"
    return None


def _deaf(entry: Entry) -> tuple[str, str] | None:
    """A command whose placeholders are wrong."""
    known = ", ".join(f"{{{name}}}" for name in sorted(_PLACEHOLDERS))
    for word in no_scripts(entry.command):
        if unknown := [name for name in _BRACED.findall(word) if name not in _PLACEHOLDERS]:
            return "command", f"'{{{unknown[0]}}}' is not replaced; there are {known}"
    for word in entry.args:
        if any(name in _PLACEHOLDERS for name in _BRACED.findall(word)):
            return "args", f"{word!r}: args are given as they are; put it into command:"
    if not any("{port}" in word or "{socket}" in word for word in entry.command):
        return "command", "no word has '{port}' or '{socket}' in it: the gateway could not reach the engine"
    if on_socket(entry.engine, entry.command) and serves_tls(entry.engine, entry.command):
        return "command", "'{socket}' is for a program that serves no TLS; leave out '{keyfile}' and '{certfile}'"
    return None


def _no_source(entry: Entry) -> tuple[str, str] | None:
    if not entry.source or entry.source != entry.source.strip():
        return "source", f"expected a folder, or a hub name 'org/name', got {entry.source!r}"
    if entry.engine != "command" and entry.source.startswith("-"):
        return "source", f"expected a folder, or a hub name 'org/name', got {entry.source!r}"
    if entry.engine != "command" and (found := _ADDRESS.fullmatch(entry.source)):
        return "source", f"an address; expected the hub name: {found[1] or 'org/name'}"
    return None
