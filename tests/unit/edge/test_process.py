"""The edge's files before it starts: what it can read is kept, what it cannot is set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_plugin.edge.frontends import APART
from gateway_plugin.edge.process import mend_maps
from gateway_plugin.edge.socket_protocol import map_text
from gateway_plugin.paths import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.make()
    return made


def test_routes_are_kept_also_of_models_kept_apart(layout: Layout) -> None:
    routes = map_text({"a/model:8b": "slot3", "b": "slot4" + APART})
    layout.models_map.write_text(routes)
    mend_maps(layout)
    assert layout.models_map.read_text() == routes
    assert layout.slot_keys_map.read_text() == ""


@pytest.mark.parametrize("content", ["a slot3\nb slo", "a\n", "\0\0\0\0", "a slot3 more words\n"])
def test_a_garbled_map_is_set_aside(layout: Layout, content: str) -> None:
    layout.models_map.write_text(content)
    mend_maps(layout)
    assert layout.models_map.read_text() == ""
    assert layout.models_map.with_name(f"{layout.models_map.name}.garbled").read_text() == content
