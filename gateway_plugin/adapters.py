"""LoRA adapters of a catalog entry: further models that the engine of their base serves. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from gateway_plugin.catalog_words import as_yaml, not_filled_in
from gateway_plugin.engine_options import Entry

PLACEHOLDER = "{adapters}"
"""In ``command``: the word is repeated, with ``NAME=PATH`` for each adapter; it is left out if there are none."""


def adapters_of(value: object) -> dict[str, str] | None:
    """``adapters``: a mapping of names to folders. Raises ``ValueError`` that shows how to write it."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping of names to folders: {my-adapter: /adapters/my-adapter}")
    for name, path in value.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r}: an adapter's name is text; write it in quotes")
        if not isinstance(path, str) or not path.startswith(("/", "~/")):
            raise ValueError(f"{name}: expected a folder in full, such as /adapters/{name}, got {as_yaml(path)}")
    return dict(value)


def adapters_refusal(entry: Entry) -> tuple[str, str] | None:
    """The first invalid key of an entry with or without adapters, and why; ``None``: all are valid.

    (1) Two ways to name adapters. (2) Text that no shell expands, or that would be another argument. (3) A command that
    does not name them, or names none that there are.
    """
    takes = any(PLACEHOLDER in word for word in entry.command)
    if entry.adapters is None:
        return ("command", f"'{PLACEHOLDER}' needs adapters: {{name: folder}}") if takes else None  # (3)
    if entry.engine not in ("vllm", "command"):
        return "adapters", f"vLLM serves them, or a command with '{PLACEHOLDER}' in it; '{entry.engine}' does not"
    words = (*entry.command, *entry.args)
    if entry.engine == "vllm" and any(word.partition("=")[0].replace("_", "-") == "--lora-modules" for word in words):
        return "args", "--lora-modules: adapters: names them already; leave it out"  # (1)
    for name, path in entry.adapters.items():
        if wrong := not_filled_in(path.removeprefix("~")):  # (2)
            return f"adapters.{name}", wrong
        if any(sign in path for sign in "\0\n,"):
            return f"adapters.{name}", f"{path!r}: a folder's path without commas and line ends"
    if entry.engine == "command" and not takes:
        return "command", f"no word has '{PLACEHOLDER}' in it, such as [--enable-lora, --lora-modules, '{PLACEHOLDER}']"
    return None


def adapter_words(adapters: Mapping[str, str] | None) -> tuple[str, ...]:
    """``NAME=PATH`` of each adapter."""
    return tuple(f"{name}={path}" for name, path in (adapters or {}).items())
