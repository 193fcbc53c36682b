"""Which catalog does ``up`` take when it is given none?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gateway_plugin.catalog import catalog_document, load_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.paths import Layout, write_private
from gateway_plugin.service.active_catalog import Chosen, choose, remember


def write(file: Path, *names: str) -> None:
    file.write_text(yaml.safe_dump({"models": {name: {"source": "org/m", "memory_gib": 1} for name in names}}))


def apply(layout: Layout, file: Path) -> None:
    write_private(layout.catalog_json, json.dumps(catalog_document(load_catalog(file))))


def names(chosen: Chosen) -> list[str]:
    return [model.name for model in chosen.catalog.models]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Of a gateway that was up with ``models.yaml``, which has one model, and is down."""
    made = Layout(tmp_path)
    write(tmp_path / "models.yaml", "alpha")
    apply(made, tmp_path / "models.yaml")
    remember(made, Chosen(tmp_path / "models.yaml", load_catalog(tmp_path / "models.yaml"), from_file=True))
    return made


def test_a_file_edited_while_the_gateway_was_down_is_read_again(layout: Layout) -> None:
    file = layout.state / "models.yaml"
    write(file, "alpha", "beta")
    chosen = choose(layout, file, lives=False)
    assert (names(chosen), chosen.note, chosen.from_file) == (["alpha", "beta"], "", True)
    file.unlink()
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        choose(layout, file, lives=False)


def test_a_living_gateway_keeps_its_catalog_and_says_that_the_file_differs(layout: Layout) -> None:
    file = layout.state / "models.yaml"
    assert choose(layout, file, lives=True).note == ""
    write(file, "beta")
    chosen = choose(layout, file, lives=True)
    assert names(chosen) == ["alpha"]
    assert f"models apply {file}" in chosen.note


def test_what_models_apply_changed_is_kept_over_every_further_up_and_said(layout: Layout) -> None:
    file, other = layout.state / "models.yaml", layout.state / "other.yaml"
    write(other, "gamma")
    apply(layout, other)
    for _ in range(2):
        chosen = choose(layout, file, lives=False)
        assert (names(chosen), chosen.from_file) == (["gamma"], False)
        assert f"{file} differs" in chosen.note
        apply(layout, other)  # as ``up`` writes it again
        remember(layout, chosen)


def test_a_file_that_was_applied_is_followed_again(layout: Layout) -> None:
    file = layout.state / "models.yaml"
    write(file, "beta")
    apply(layout, file)
    chosen = choose(layout, file, lives=False)
    assert (names(chosen), chosen.note) == (["beta"], "")
    remember(layout, chosen)
    write(file, "gamma")
    assert names(choose(layout, file, lives=False)) == ["gamma"]
