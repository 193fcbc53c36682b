"""``gateway models recipes``: models that people run on clusters, and how vLLM is started for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gateway_plugin.cli.output import json_option, put, show, table

if TYPE_CHECKING:
    from gateway_plugin.recipes.recipes import Recipe


@click.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None) -> None:
    """Models with the options that their makers and vLLM's documents give; with NAME: one of them, as an entry."""
    from gateway_plugin.recipes.recipes import find_recipe
    from gateway_plugin.recipes.recipes import recipes as known

    if name is not None:
        recipe = find_recipe(name)
        show(_document(recipe), lambda: put(_shown(recipe)))
        return
    found = known().values()
    rows = [(one.name, one.source, one.task, one.about) for one in found]
    show([_document(one) for one in found], lambda: table(("recipe", "model", "task", "for"), rows))


def recipe_of(name: str) -> Recipe | None:
    """The recipe that NAME of ``models plan`` and ``models add`` means; ``None``: NAME is a model's own."""
    from gateway_plugin.errors import NotFound
    from gateway_plugin.recipes.recipes import find_recipe

    if "/" in name:
        return None
    try:
        return find_recipe(name)
    except NotFound:
        return None


def _document(recipe: Recipe) -> dict[str, object]:
    return {
        "recipe": recipe.name,
        "for": recipe.about,
        "entry": recipe.entry(),
        "note": recipe.note or None,
        "card": recipe.card,
        "from": [one.model_dump() for one in recipe.documents],
    }


def _shown(recipe: Recipe) -> str:
    import yaml

    entry = yaml.safe_dump({recipe.name: recipe.entry()}, sort_keys=False, default_flow_style=None, width=10_000)
    lines = [f"# {recipe.about}", *entry.splitlines()]
    lines += [f"# {recipe.note}"] if recipe.note else []
    lines += [f"# {recipe.card}", *(f"# {one.url} ({one.date})" for one in recipe.documents)]
    return "\n".join([*lines, f"# gateway models add {recipe.name}: with gpus and memory worked out for this site"])
