"""What a catalog entry may tell its engine: words as they must be written, and which options are the gateway's. Pure.

vLLM takes ``args`` last, and of two options the later: one that the gateway gives itself would win, and the engine
would listen elsewhere, ask for another key or take other GPUs. Such an option is refused in each spelling that vLLM's
parser takes: ``--served_model_name``, ``--port=1``, beginnings such as ``--served``, and short ones such as ``-tp``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

import yaml

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
    "config": "a file that is not looked into here; put its options into args:",
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
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNEXPANDED = re.compile(r"\$\{\w+\}|^\$[A-Za-z_]\w*(?=/|$)")
_TWO_WORDS = re.compile(r"\s*-[^\s=]*\s.*", re.DOTALL)


def text_of(value: object) -> str:
    """A word as text: numbers as they read. Raises ``ValueError`` for what YAML makes no text of."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected text, got {_yaml(value)}; write it in quotes")


def words_of(value: object) -> tuple[str, ...]:
    """``args`` and ``command``: a list of words and numbers. Raises ``ValueError`` that shows how to write it."""
    if isinstance(value, list | tuple):
        try:
            return tuple(text_of(word) for word in value)
        except ValueError as error:
            raise ValueError(f"{error}; expected a list of words: {_yaml(spelled(value))}") from None
    raise ValueError(f"expected a list of words: {_yaml(spelled(value))}")


def names_of(value: object) -> tuple[str, ...]:
    """``aliases``: a list. Raises ``ValueError`` that shows how to write it."""
    if isinstance(value, list | tuple):
        return tuple(text_of(name) for name in value)
    raise ValueError(f"expected a list of names: {_yaml([str(value)])}")


def variables_of(value: object) -> dict[str, str]:
    """``env``: a mapping of names to texts or numbers. Raises ``ValueError`` that shows how to write it."""
    if not isinstance(value, Mapping):
        raise ValueError('expected a mapping of names to texts: {NAME: "1"}')
    for name, setting in value.items():
        if not isinstance(setting, str | int | float) or isinstance(setting, bool):
            raise ValueError(f'{name}: expected text, such as "1", got {_yaml(setting)}; write it in quotes')
    return {text_of(name): text_of(setting) for name, setting in value.items()}


def spelled(value: object) -> list[str]:
    """The list of words that somebody meant who wrote one text, or a mapping, or nested ones."""
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError:
            return value.split()
    if isinstance(value, Mapping):
        return [
            word
            for option, setting in value.items()
            if setting is not False
            for word in (str(option), *(() if setting is True or setting is None else _value(setting)))
        ]
    if isinstance(value, list | tuple):
        return [word for part in value for word in _value(part)]
    return [] if value is None else [str(value)]


def _value(value: object) -> list[str]:
    if isinstance(value, bool) or value is None:
        return []  # a flag stands alone
    if isinstance(value, str):
        return spelled(value) if _TWO_WORDS.fullmatch(value) else [value]
    if isinstance(value, Mapping) and all(str(key).startswith("-") for key in value):
        return spelled(value)
    return [json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else str(value)]


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return re.sub(r"\s*\n\s*", " ", str(text).removesuffix("\n...\n").strip())


def refusal(
    engine: str, source: str, args: Sequence[str], command: Sequence[str], env: Mapping[str, str], gpus: int
) -> tuple[str, str] | None:
    """The key of an entry that cannot be, and why; ``None``: none.

    (1) Several words in one. (2) vLLM's options that are the gateway's. (3) Variables that are, or are none. (4) What a
    shell would fill in: no shell reads a catalog (a command may be one).
    """
    for key, words in (("args", args), ("command", command)):  # (1)
        for word in words:
            if _TWO_WORDS.fullmatch(word):
                return key, f"{word!r}: one word each; expected {_yaml(spelled(list(words)))}"
    if engine == "vllm" and (said := _taken(args, gpus)):  # (2)
        return "args", said
    for name in env:  # (3)
        if name in _TAKEN_VARIABLES:
            return "env", f"{name}: {_TAKEN_VARIABLES[name]}"
        if not _VARIABLE.fullmatch(name):
            return "env", f"{name!r}: expected the name of an environment variable"
    filled = (*(("args", word) for word in args), *((f"env.{name}", setting) for name, setting in env.items()))
    for key, text in (("source", source), *(("command", word) for word in command), *filled):  # (4)
        if "\0" in text:
            return key, f"{text!r}: no text may have a NUL in it"
        if key != "command" and _UNEXPANDED.search(text):
            return (
                key,
                f"{text!r}: no shell fills in variables here; write it out, or export it in the site's worker_init",
            )
    return None


def _taken(args: Sequence[str], gpus: int) -> str:
    """Every option of ``args`` that is the gateway's; those with the same reason stand together."""
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
    """Why an option is the gateway's; ``None``: it is not, or is a value. ``word``: without ``=value``."""
    if not re.match(r"--?[A-Za-z_]|--$", word):
        return None
    if not word.startswith("--"):
        name = word[1:]
        if name[0] in "nr":  # -n2: these two take their value without a blank, and no other begins with them
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
    """By its whole name, or by a beginning: vLLM's parser takes one that only one option has."""
    beginnings: Iterable[str] = (reason for full, reason in options.items() if full.startswith(name))
    return options.get(name) or next(iter(beginnings), None)
