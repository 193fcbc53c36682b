"""Which engine options a catalog entry may set, and which are reserved for the gateway. Pure.

vLLM gets ``args`` last and uses the later of two equal options: an entry could override the gateway's own, and the
engine would listen elsewhere, expect another key or take other GPUs. Such an option is refused in every spelling that
vLLM's parser accepts: ``--served_model_name``, ``--port=1``, prefixes such as ``--served``, and short ones such as
``-tp``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from gateway_plugin.catalog_words import as_yaml, no_scripts, not_filled_in, one_word_each

_OWN = "the gateway gives this itself; leave it out"
_ONE_NODE = "an engine has GPUs of one node and splits each layer over them; say gpus:"
_HTTP = "the gateway speaks HTTP to one server; leave it out"
_SHARE = "say memory_gib: (GiB of each GPU)"

_TAKEN = {
    **dict.fromkeys(("host", "port", "uds", "api-key", "enable-ssl-refresh"), _OWN),
    **dict.fromkeys(("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers"), _OWN),
    **dict.fromkeys(("grpc", "grpc-port", "headless"), _HTTP),
    **dict.fromkeys(("pipeline-parallel-size", "prefill-context-parallel-size", "device-ids"), _ONE_NODE),
    **dict.fromkeys(("nnodes", "node-rank", "master-addr", "master-port"), _ONE_NODE),
    **dict.fromkeys(("gpu-memory-utilization", "device-memory-utilization"), _SHARE),
    "data-parallel-size": _ONE_NODE,
    "tensor-parallel-size": "say gpus:",
    "model": "say source:",
    "revision": "say source: org/name@REVISION",
    "served-model-name": "say it by the entry's own name and aliases:",
    "hf-token": "every user of the node can read it there; say env: {HF_TOKEN: ...}",
    "config": "a file that is not checked here; put its options into args:",
}
_TAKEN_FAMILIES = {"ssl-": _OWN, "data-parallel-": _ONE_NODE}
_SHORT = {
    **dict.fromkeys(
        ("n", "r", "pp", "pcp", "dp", "dpn", "dpr", "dpl", "dpa", "dpp", "dpb", "dph", "dpe", "dpm"), _ONE_NODE
    ),
    "tp": _TAKEN["tensor-parallel-size"],
}
_SHORT_FREE = frozenset({"asc", "q", "dcp", "ep", "sc", "dc", "cc", "ac", "O"})
_BACKEND = "distributed-executor-backend"

_TAKEN_VARIABLES = {
    "VLLM_API_KEY": "the gateway gives it itself",
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "the gateway chooses GPUs; say gpus:"
    ),
}
_SEQUENCES = ("max-num-seqs", "max-num-seq", "max-num-se")
_ACTIVE = ("max-num-active-seqs", "max-num-active-seq", "max-num-active")
"""With prefixes that vLLM's parser takes for these options."""
_SEQUENCES_GPU, _SEQUENCES_CPU = 256, 128
"""Defaults of vLLM 0.32 as an API server (``EngineArgs.get_batch_defaults``). On a GPU of 70 GiB and more, an A100
excepted, it takes 1,024. Which GPU it will be is not known here, and what is over its own limit would queue in it."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_POOLS = re.compile(r"--(?:runner[= ]pooling|convert[= ]embed|task[= ]embed(?:ding)?)\b")
"""Options of an engine that makes vectors; ``--task`` is an earlier vLLM's."""
_PLACEHOLDERS = frozenset(
    {"host", "port", "name", "model", "names", "source", "revision", "keyfile", "certfile", "cafile", "python"}
)
"""Placeholders of ``command``; see ``serve.agent.argv``."""
_BRACED = re.compile(r"(?<![{$])\{([A-Za-z_]+)\}(?!\})")
_ADDRESS = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+).*|https?://.*")


class Entry(Protocol):
    """The fields of a catalog entry that are checked (``gateway_plugin.catalog.Model``)."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def source(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def command(self) -> tuple[str, ...]: ...
    @property
    def args(self) -> tuple[str, ...]: ...
    @property
    def env(self) -> Mapping[str, str]: ...
    @property
    def gpus(self) -> int: ...


def refusal(entry: Entry) -> tuple[str, str] | None:
    """The first invalid key of an entry, and why; ``None``: all are valid.

    (1) Malformed arguments. (2) vLLM's options that are the gateway's, or another task's. (3) Adapters that no request
    could name. (4) Variables that are the gateway's, or invalid. (5) Shell expansions: no shell reads a catalog (a
    command may be one). (6) A command without the port to listen on. (7) An invalid source.
    """
    for key, words in (("args", entry.args), ("command", tuple(no_scripts(entry.command)))):  # (1)
        if wrong := one_word_each(words):
            return key, wrong
    if entry.engine == "vllm" and (said := _taken(entry.args, entry.gpus) or _other_task(entry)):  # (2)
        return "args", said
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
    if found is None or entry.task == "embed":
        return ""
    return f"{found[0].replace('=', ' ').partition(' ')[0]}: an engine that makes vectors; say task: embed"


def adapters(words: Sequence[str]) -> tuple[str, ...]:
    """Names of the LoRA adapters that vLLM with these arguments loads beside its base (``--lora-modules``)."""
    return tuple(name for option in _lora_options(words) for name in option)


def requests_at_a_time(entry: Entry) -> int | None:
    """How many requests an engine works on at a time: (1) ``--max-num-seqs``, the last one, as vLLM reads it, else its
    default; (2) ``None``: another program, not known; (3) ``--max-num-active-seqs`` lowers it."""
    words = (*entry.command, *entry.args)
    default = _SEQUENCES_GPU if entry.gpus else _SEQUENCES_CPU
    taken = _last_number(words, _SEQUENCES) or (default if entry.engine == "vllm" else None)  # (1), (2)
    active = _last_number(words, _ACTIVE)
    return active if taken is None else min(taken, active or taken)  # (3)


def _last_number(words: Sequence[str], options: Sequence[str]) -> int | None:
    """The last positive number given by one of these spellings."""
    for place in reversed(range(len(words))):
        option, given, value = words[place].partition("=")
        if option.startswith("--") and option[2:].replace("_", "-") in options:
            value = value if given else next(iter(words[place + 1 : place + 2]), "")
            if re.fullmatch(r"0*[1-9][0-9]{0,9}", value, re.ASCII):
                return int(value)
    return None


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
    if not any("{port}" in word for word in entry.command):
        return "command", "no word has '{port}' in it: the gateway could not reach the engine"
    return None


def _no_source(entry: Entry) -> tuple[str, str] | None:
    if not entry.source or entry.source != entry.source.strip():
        return "source", f"expected a folder, or a hub name 'org/name', got {entry.source!r}"
    if entry.engine == "vllm" and entry.source.startswith("-"):
        return "source", f"expected a folder, or a hub name 'org/name', got {entry.source!r}"
    if entry.engine == "vllm" and (found := _ADDRESS.fullmatch(entry.source)):
        return "source", f"an address; expected the hub name: {found[1] or 'org/name'}"
    return None


def _taken(args: Sequence[str], gpus: int) -> str:
    """Every option of ``args`` that is reserved for the gateway, grouped by reason."""
    if args and not args[0].startswith("-"):
        return f"{args[0]!r} is no option; expected the options that come after 'vllm serve MODEL'"
    by_reason: dict[str, list[str]] = {}
    for place, word in enumerate(args):
        said, given, value = word.partition("=")
        value = value if given else next(iter(args[place + 1 : place + 2]), "")
        if (reason := _reason(said, value)) is None:
            continue
        if reason == _TAKEN["tensor-parallel-size"]:
            reason = f"'gpus: {gpus}' says it; leave it out" if value == str(gpus) else f"say gpus: {value}"
        if said not in by_reason.setdefault(reason, []):
            by_reason[reason].append(said)
    return "; ".join(f"{', '.join(words)}: {reason}" for reason, words in by_reason.items())


def _reason(word: str, value: str) -> str | None:
    """Why an option is reserved for the gateway; ``None``: it is not, or is a value. ``word``: without ``=value``."""
    if not re.match(r"--?[A-Za-z_]|--$", word):
        return None
    if not word.startswith("--"):
        name = word[1:]
        if name[0] in "nr":  # -n2: these two take their value without a blank, and no other option has these initials
            return _ONE_NODE
        return None if name in _SHORT_FREE else _of(name, _SHORT)
    name = word[2:].partition(".")[0].replace("_", "-")
    if not name:
        return "what comes after it is no option; leave it out"
    family = next((reason for start, reason in _TAKEN_FAMILIES.items() if name.startswith(start)), None)
    if _BACKEND.startswith(name) and value == "ray":
        return "an engine is on one node, and the gateway's Ray is not its own; leave it out"
    return family or _of(name, _TAKEN)


def _of(name: str, options: Mapping[str, str]) -> str | None:
    """By the full name, or a prefix: vLLM's parser accepts a prefix that only one option has."""
    beginnings: Iterable[str] = (reason for full, reason in options.items() if full.startswith(name))
    return options.get(name) or next(iter(beginnings), None)
