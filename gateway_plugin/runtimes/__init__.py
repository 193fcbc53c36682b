"""Runtimes: the software that an engine runs in, by name beside the catalog's models. Pure.

A runtime is a Python of its own (a virtual environment or conda's, with another version of the engine than the
gateway's), environment modules, a container, or several of these: modules are loaded first, then the container starts,
and in it the Python. An entry without a runtime runs in the gateway's own environment. ``runtimes.start`` makes
the command line of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gateway_plugin.catalog_words import names_of, variables_of, words_of

ContainerKind = Literal["apptainer", "singularity", "podman-hpc", "podman", "charliecloud", "shifter", "enroot"]
Words = Annotated[tuple[str, ...], BeforeValidator(words_of)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Container(_Frozen):
    """The container that an engine is started in, on its node."""

    kind: ContainerKind
    image: str
    """A file, a folder, or a name, as ``kind`` takes it."""
    binds: Words = ()
    """Further folders that the engine sees: ``PATH``, or ``PATH:PATH_INSIDE``."""
    args: Words = ()
    """Further arguments of the container's program."""


class Runtime(_Frozen):
    """One runtime."""

    name: str
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

    def interpreter(self, own: str) -> str:
        """Its Python; ``own``: the gateway's."""
        return self.python or ("python3" if self.container is not None or self.modules else own)
