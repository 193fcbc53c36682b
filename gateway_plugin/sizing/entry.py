"""A catalog entry from a plan, as text with its reasons, and its place in the user's file."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from gateway_plugin.catalog import load_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.files import write_private
from gateway_plugin.sizing.plan import GIB, Fit, Source, Wish, parameters_words


def entry_text(name: str, source: Source, fit: Fit, wish: Wish, task: str) -> str:
    """YAML lines of one entry of ``models``, indented by two, with comments that say where its numbers come from."""
    engine = fit.engine
    assert engine is not None, "only what fits becomes an entry"
    architecture = source.architecture
    pinned = f"{source.name}@{source.revision}" if source.revision else source.name
    args = ["--max-model-len", str(engine.context)]
    args += [] if engine.gpus or not engine.cache else ["--kv-cache-memory-bytes", str(engine.cache)]
    args += ["--quantization", wish.quantization] if wish.quantization else []
    what = f"{architecture.name}, {parameters_words(architecture)}"
    quantized = wish.quantization or architecture.quantization
    lines = [
        f"  {_scalar(name)}:",
        f"    # {what}, {quantized or architecture.dtype}{f', {source.license}' if source.license else ''}",
        f"    source: {_scalar(pinned)}",
        f"    task: {task}",
        *([f"    gpus: {engine.gpus}"] if engine.gpus else []),
        f"    # {'each GPU: ' if engine.gpus else ''}weights {engine.weights / GIB:.1f} GiB, engine "
        f"{engine.buffers / GIB:.1f} GiB, cache {engine.cache / GIB:.1f} GiB for {engine.sequences} sequences of "
        f"{engine.context} tokens",
        f"    memory_gib: {engine.gib:g}",
        f"    args: [{', '.join(_scalar(word) for word in args)}]",
    ]
    return "\n".join(lines) + "\n"


def with_entry(file: Path, text: str) -> str:
    """The content of the catalog ``file`` with ``text`` as the last entry of ``models``; comments stay.

    Raises ``ConfigError`` if the file is not valid, or not in block style.
    """
    if not file.exists():
        return "models:\n" + text
    load_catalog(file)
    before = file.read_text(encoding="utf-8")
    indents = re.findall(r"^( +)[^\s#]", before, re.MULTILINE)
    if not re.search(r"^models:[ \t]*(#.*)?$", before, re.MULTILINE) or not indents:
        raise ConfigError(f"{file}: 'models' is not a mapping with a line for each entry; add this by hand:\n{text}")
    first = indents[0]
    moved = "".join(first + line[2:] if line.startswith("  ") else line for line in text.splitlines(keepends=True))
    return before.rstrip("\n") + "\n" + moved


def add_entry(file: Path, text: str) -> None:
    """Write the catalog with the new entry: atomically, and only if it is valid. Raises ``ConfigError``."""
    content = with_entry(file, text)
    trial = file.with_name(f".{file.name}.new")
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
    try:
        write_private(trial, content)
        load_catalog(trial)
        trial.chmod(mode)
        trial.replace(file)
    except ConfigError as error:
        raise ConfigError(error.message.replace(str(trial), str(file))) from None
    finally:
        trial.unlink(missing_ok=True)


def _scalar(text: str) -> str:
    """``text`` as YAML reads it back."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
