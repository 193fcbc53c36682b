"""The recipes in ``recipes.yaml``, and a recipe as a catalog entry."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import Field

from gateway_plugin.catalog_values import Frozen
from gateway_plugin.engine_kinds import Task
from gateway_plugin.errors import NotFound


class Document(Frozen):
    """A document that options are from."""

    url: str = Field(pattern=r"^https://")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    """Of its last change, else when it was read."""


class Recipe(Frozen):
    """One model, and how vLLM is started for it."""

    name: str
    source: str
    """Its hub repository; ``models add`` pins the revision."""
    about: str
    task: Task = "generate"
    args: tuple[str, ...] = ()
    note: str = ""
    documents: tuple[Document, ...] = Field(default=(), alias="from")

    @property
    def card(self) -> str:
        """Address of its makers' description."""
        return f"https://huggingface.co/{self.source}"

    def entry(self) -> dict[str, Any]:
        """Its catalog entry, to which ``gpus`` is added where it needs them; ``memory_gib`` is worked out."""
        task = {} if self.task == "generate" else {"task": self.task}
        args = {"args": list(self.args)} if self.args else {}
        return {"source": self.source, **task, **args}


@cache
def recipes() -> dict[str, Recipe]:
    """Name -> recipe, in the order of the file."""
    text = resources.files("gateway_plugin.recipes").joinpath("recipes.yaml").read_text(encoding="utf-8")
    return {name: Recipe(name=name, **fields) for name, fields in yaml.safe_load(text).items()}


def find_recipe(name: str) -> Recipe:
    """The recipe called ``name``, in any case of letters, or that of this hub repository. Raises ``NotFound``."""
    for recipe in recipes().values():
        if name.lower() in (recipe.name, recipe.source.lower()):
            return recipe
    raise NotFound(f"There is no recipe '{name}'; 'gateway models recipes' lists them.")
