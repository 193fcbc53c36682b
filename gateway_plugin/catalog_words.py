"""Checks the arguments and texts of a catalog: one argument per item, and no shell syntax. Pure.

Users copy command lines. What YAML would misread is refused, and the error shows the list that was meant.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

import yaml

_VARIABLE = r"\$[A-Za-z_]\w*(?=[/:,]|$)"
_UNEXPANDED = re.compile(rf"\$[{{(]\w+|(?:^|[=:,/]){_VARIABLE}|(?:^|[=:,])~(?=/|$)|^\S*`[^`\s]+`\S*$")
"""Shell expansions: ``${SCRATCH}``, ``$(pwd)``, ``a=$HOME/x``, ``/data/$USER``, ``~/x``, backquotes."""
_OF_A_SHELL = re.compile(r"(?:\d?|&)>>?(?:&\d|[\w./~-]\S*)?|<|\|\|?|&&?|;")
"""Pipes, redirections and the like, as separate arguments."""
_TWO_WORDS = re.compile(r"\s+-\S*|\s*-[^\s=]*\s.*", re.DOTALL)
_TYPOGRAPHIC = re.compile("[\u2010-\u2015\u2212].*|[\u2018-\u201f].*|.*[\u2018-\u201f]", re.DOTALL)
"""Typographic dashes and quotes, made of ``-`` and ``"`` by a web page or a word processor."""
_SCRIPT_NEXT = re.compile(r"-[a-z]*c")
"""``sh -c``, ``bash -lc``, ``python -c``: the next argument is a program, with a syntax of its own."""


def text_of(value: object) -> str:
    """An argument as text: numbers as written. Raises ``ValueError`` for other types, into which YAML turned a text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected text, got {as_yaml(value)}; write it in quotes")


def words_of(value: object) -> tuple[str, ...]:
    """``args`` and ``command``: a list of texts and numbers. Raises ``ValueError`` that shows how to write it."""
    if isinstance(value, list | tuple):
        try:
            return tuple(text_of(word) for word in value)
        except ValueError as error:
            raise ValueError(f"{error}; expected a list of words: {as_yaml(spelled(value))}") from None
    raise ValueError(f"expected a list of words: {as_yaml(spelled(value))}")


def names_of(value: object) -> tuple[str, ...]:
    """``aliases``: a list. Raises ``ValueError`` that shows how to write it."""
    if isinstance(value, list | tuple):
        return tuple(text_of(name) for name in value)
    raise ValueError(f"expected a list of names: {as_yaml([str(value)])}")


def variables_of(value: object) -> dict[str, str]:
    """``env``: a mapping of names to texts or numbers. Raises ``ValueError`` that shows how to write it."""
    if not isinstance(value, Mapping):
        raise ValueError('expected a mapping of names to texts: {NAME: "1"}')
    for name, setting in value.items():
        if not isinstance(setting, str | int | float) or isinstance(setting, bool):
            raise ValueError(f'{name}: expected text, such as "1", got {as_yaml(setting)}; write it in quotes')
    return {text_of(name): text_of(setting) for name, setting in value.items()}


def spelled(value: object) -> list[str]:
    """The list of arguments that was meant by one text, a mapping, or nested lists."""
    if isinstance(value, str):
        return _after_serve(_split(value))
    if isinstance(value, Mapping):
        return [
            word
            for option, setting in value.items()
            if setting is not False
            for word in (_option(str(option)), *(() if setting is True or setting is None else _value(setting)))
        ]
    if isinstance(value, list | tuple):
        return [word for part in value for word in _value(part)]
    return [] if value is None else [str(value)]


def _split(text: str) -> list[str]:
    """Split as a shell does, with continuation lines (backslash) and comments at the ends of lines."""
    joined = re.sub(r"\\\s*\n", " ", text)
    lines = "\n".join(re.sub(r"(^|\s)#.*$", "", line) for line in joined.split("\n"))
    try:
        return shlex.split(lines)
    except ValueError:
        return lines.split()


def _after_serve(words: list[str]) -> list[str]:
    """The arguments without a leading ``vllm serve MODEL``."""
    for place in range(len(words) - 1):
        if words[place].rpartition("/")[2] == "vllm" and words[place + 1] == "serve":
            left = words[place + 2 :]
            return left if left and left[0].startswith("-") else left[1:]
    return words


def _option(name: str) -> str:
    return name if name.startswith("-") else f"--{name.replace('_', '-')}"


def _value(value: object) -> list[str]:
    if isinstance(value, bool) or value is None:
        return []  # a flag has no value
    if isinstance(value, str):
        return _split(value) if _TWO_WORDS.fullmatch(value) else [value]
    if isinstance(value, Mapping) and all(str(key).startswith("-") for key in value):
        return spelled(value)
    if isinstance(value, list | tuple) and all(isinstance(part, str | int | float) for part in value):
        return spelled(value)
    return [json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else str(value)]


def as_yaml(value: object) -> str:
    """In one line, as written in the file."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return re.sub(r"\s*\n\s*", " ", str(text).removesuffix("\n...\n").strip())


def one_word_each(words: Sequence[str]) -> str | None:
    """The first problem of a list of arguments; ``None``: there is none.

    (1) Several in one, or leading blanks. (2) Shell syntax. (3) Typographic dashes and quotes.
    """
    for word in words:
        if _TWO_WORDS.fullmatch(word):  # (1)
            return f"{word!r}: one word each; expected {as_yaml(spelled(list(words)))}"
        if _OF_A_SHELL.fullmatch(word):  # (2)
            return f"{word!r}: no shell reads these words; leave it out, and what is behind it"
        if _TYPOGRAPHIC.fullmatch(word):  # (3)
            return f"{word!r}: dashes and quotes as a keyboard has them: - \" '"
    return None


def no_scripts(words: Sequence[str]) -> Iterable[str]:
    """The arguments of a command that are not program text."""
    return (word for before, word in zip(("", *words), words, strict=False) if not _SCRIPT_NEXT.fullmatch(before))


def not_filled_in(text: str) -> str | None:
    """Why ``text`` will not mean what its author expects; ``None``: it has no shell expansion."""
    if _UNEXPANDED.search(text) is None:
        return None
    return f"{text!r}: no shell fills in variables here; write it out, or export it in the site's worker_init"
