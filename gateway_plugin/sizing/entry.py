"""A catalog entry from a plan, as text with its reasons, and its place in the user's file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from gateway_plugin.catalog import load_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.files import write_private
from gateway_plugin.sizing.plan import GIB, Fit, Source, Wish, parameters_words


def entry_text(
    name: str, source: Source, fit: Fit, wish: Wish, task: str, more: Sequence[str] = (), why: str = ""
) -> str:
    """YAML lines of one entry of ``models``, indented by two, with comments that say where its numbers come from.

    ``more``: further options for vLLM; ``why``: a comment on them.
    """
    engine = fit.engine
    assert engine is not None, "only what fits becomes an entry"
    architecture = source.architecture
    pinned = f"{source.name}@{source.revision}" if source.revision else source.name
    args = ["--max-model-len", str(engine.context)]
    args += [] if engine.gpus or not engine.cache else ["--kv-cache-memory-bytes", str(engine.cache)]
    args += ["--quantization", wish.quantization] if wish.quantization else []
    args += _without_context(more)
    kind = wish.quantization or architecture.quantization or architecture.dtype
    what = [architecture.name, parameters_words(architecture), kind, *([source.license] if source.license else [])]
    lines = [
        f"  {_scalar(name)}:",
        f"    # {_comment(', '.join(what))}",
        f"    source: {_scalar(pinned)}",
        f"    task: {task}",
        *([f"    gpus: {engine.gpus}"] if engine.gpus else []),
        f"    # {'each GPU: ' if engine.gpus else ''}weights {engine.weights / GIB:.1f} GiB, engine "
        f"{engine.buffers / GIB:.1f} GiB, cache {engine.cache / GIB:.1f} GiB for {engine.sequences} sequences of "
        f"{engine.context} tokens",
        f"    memory_gib: {engine.gib:g}",
        *([f"    # {_comment(why)}"] if why else []),
        f"    args: [{', '.join(_scalar(word) for word in args)}]",
    ]
    return "\n".join(lines) + "\n"


def _without_context(words: Sequence[str]) -> list[str]:
    """``words`` without ``--max-model-len N``: the plan has it."""
    if "--max-model-len" not in words:
        return list(words)
    place = words.index("--max-model-len")
    return [*words[:place], *words[place + 2 :]]


def with_entry(file: Path, text: str) -> str:
    """The content of the catalog ``file`` with ``text`` as the last entry of ``models``; comments and line ends stay.

    Raises ``ConfigError`` if the file is not valid, not in block style, or has a model of that name.
    """
    if not file.exists():
        return "models:\n" + text
    (name,) = yaml.safe_load(text)
    if any(name == model.name for model in load_catalog(file, unsized=True).models):
        raise ConfigError(f"{file} has a model called '{name}' already: remove that entry, or say --as NAME.")
    before = file.read_bytes().decode()
    block = re.search(r"^models:[ \t]*(#.*)?\r?$", before, re.MULTILINE)
    if not block or re.search(r"^\.\.\.", before, re.MULTILINE):
        raise _by_hand(file, text)
    end = _end_of(before, block.end())
    indents = re.findall(r"^( +)[^\s#]", before[block.end() : end], re.MULTILINE)
    if not indents:
        raise _by_hand(file, text)
    first = indents[0]
    moved = "".join(first + line[2:] if line.startswith("  ") else line for line in text.splitlines(keepends=True))
    if "\r\n" in before:
        moved = moved.replace("\n", "\r\n")
    return before[:end] + ("" if before[:end].endswith("\n") else "\n") + moved + before[end:]


def _end_of(text: str, begin: int) -> int:
    """Where the block that begins at ``begin`` ends: before the next key at the margin, and its comments."""
    following = re.compile(r"^(?:[ \t]*(?:#.*)?\r?\n)*(?=[^\s#])", re.MULTILINE).search(text, begin + 1)
    return following.start() if following and begin < len(text) else len(text)


def add_entry(file: Path, text: str) -> None:
    """Write the catalog with the new entry: atomically, and only if it is valid and the other entries stay as they are.

    A link to it stays one. Raises ``ConfigError``.
    """
    real = file.resolve()
    trial = real.with_name(f".{real.name}.new")
    with _alone_in(real.parent):
        _write(file, real, trial, text)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One writer at a time: of two entries added at once the second would be lost. No lock where there is none."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _write(file: Path, real: Path, trial: Path, text: str) -> None:
    content = with_entry(file, text)
    old = load_catalog(file, unsized=True).models if file.exists() else ()
    try:
        write_private(trial, content)
        if load_catalog(trial, unsized=True).models[:-1] != old:
            raise _by_hand(file, text)
        _as_before(trial, real)
        trial.replace(real)
    except ConfigError as error:
        raise ConfigError(error.message.replace(str(trial), str(file))) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def _as_before(trial: Path, real: Path) -> None:
    """Give ``trial`` the mode of the file that it will replace, and its owner and group where that is allowed."""
    if not real.exists():
        trial.chmod(0o644)
        return
    was = real.stat()
    with contextlib.suppress(OSError):
        os.chown(trial, was.st_uid, was.st_gid)
    trial.chmod(was.st_mode & 0o777)


def _by_hand(file: Path, text: str) -> ConfigError:
    return ConfigError(f"{file}: 'models' is not a mapping with a line for each entry; add this by hand:\n{text}")


def _comment(text: str) -> str:
    """``text`` on one line: what is beyond it would be read as an entry."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _scalar(text: str) -> str:
    """``text`` as YAML reads it back."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
