"""Runtimes: the software that an engine runs in, by name beside the catalog's models. Pure.

A runtime is a Python of its own (a virtual environment or conda's, with another version of the engine than the
gateway's), environment modules, a container, or several of these: modules are loaded first, then the container starts,
and in it the Python. An entry without a runtime runs in the gateway's own environment. ``runtimes.start`` makes
the command line of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from gateway_plugin.catalog_values import Frozen, matching
from gateway_plugin.catalog_words import names_of, not_filled_in, one_word_each, variables_of, words_of
from gateway_plugin.engine_options import refused_variable

ContainerKind = Literal["apptainer", "singularity", "podman-hpc", "podman", "charliecloud", "shifter", "enroot"]
Words = Annotated[tuple[str, ...], BeforeValidator(words_of)]


_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})?")
"""The name of a folder too. Empty: the gateway's own environment, which no catalog names."""
_BIND = re.compile(r"/[^:,\s]*(:/[^:,\s]*(:r[ow])?)?")


class Container(Frozen):
    """The container that an engine is started in, on its node."""

    kind: ContainerKind
    image: str
    """A file, a folder, or a name, as ``kind`` takes it."""
    binds: Words = ()
    """Further folders that the engine sees: ``PATH``, or ``PATH:PATH_INSIDE``."""
    args: Words = ()
    """Further arguments of the container's program."""

    @field_validator("image")
    @classmethod
    def _whole_image(cls, value: str) -> str:
        if not value.strip() or value.startswith("-") or value.startswith(("~", "./", "../")):
            raise ValueError(f"expected a full path, or a name as the program takes it, got {value!r}")
        if "://" in value:
            raise ValueError(f"fetch it before ('apptainer pull', 'enroot import', ...) and name the file: {value!r}")
        return _plain((value,))[0]

    @field_validator("binds")
    @classmethod
    def _whole_binds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for bind in value:
            if not _BIND.fullmatch(bind):
                raise ValueError(f"expected /PATH, or /PATH:/PATH_INSIDE, got {bind!r}")
        return _plain(value)

    @field_validator("args")
    @classmethod
    def _one_word_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := one_word_each(value):
            raise ValueError(wrong)
        return _plain(value)


class Runtime(Frozen):
    """One runtime."""

    name: Annotated[str, matching(_NAME, "a runtime's name is letters, digits, '.', '-' and '_'")]
    python: str = ""
    """The interpreter, as a path where the engine runs (inside the container, if there is one); ``""``: the gateway's
    own; in a container or behind modules ``python3``."""
    modules: Annotated[tuple[str, ...], BeforeValidator(names_of)] = ()
    """Environment modules, in the order in which they are loaded."""
    module_folders: Annotated[tuple[str, ...], BeforeValidator(names_of)] = ()
    """Folders with module files that are searched too (``module use``)."""
    container: Container | None = None
    env: Annotated[dict[str, str], BeforeValidator(variables_of)] = Field(default_factory=dict)
    """Variables of every engine in this runtime; an entry's own come after them."""

    @field_validator("python")
    @classmethod
    def _whole_python(cls, value: str) -> str:
        if value and not value.startswith("/") and "/" in value:
            raise ValueError(f"expected the interpreter's full path, got {value!r}")
        return _plain((value,))[0]

    @field_validator("modules", "module_folders")
    @classmethod
    def _no_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if not word or word.startswith("-") or any(character.isspace() for character in word):
                raise ValueError(f"expected one name for each item, got {word!r}")
        return _plain(value)

    @field_validator("env")
    @classmethod
    def _free_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if wrong := refused_variable(name):
                raise ValueError(wrong)
        _plain(value.values())
        return value

    def interpreter(self, own: str) -> str:
        """Its Python; ``own``: the gateway's."""
        return self.python or ("python3" if self.container is not None or self.modules else own)


def _plain(words: Iterable[str]) -> tuple[str, ...]:
    """``words``, none of which a shell would have to expand. Raises ``ValueError``."""
    found = tuple(words)
    for word in found:
        if "\0" in word:
            raise ValueError(f"{word!r}: no text may have a NUL in it")
        if wrong := not_filled_in(word):
            raise ValueError(wrong)
    return found
