"""``gateway doctor`` where the record says little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway_plugin.doctor.doctor import examine
from gateway_plugin.paths import Layout
from gateway_plugin.service.checks import Verdict
from gateway_plugin.site import load_site

pytestmark = pytest.mark.process


def test_what_a_record_does_not_say_is_as_up_would_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    layout = Layout(tmp_path / "state")
    layout.make()
    layout.service_json.write_text(json.dumps({"site": load_site("local").name}))
    found = {check.name: check for check in examine(layout.state, None, None)}
    assert found["site"].verdict is Verdict.OK
    assert found["catalog"].verdict is Verdict.WARN
    assert f"there is no {tmp_path / 'models.yaml'}" in found["catalog"].found
    (tmp_path / "models.yaml").write_text("models: {}\n")
    found = {check.name: check for check in examine(layout.state, None, None)}
    assert found["catalog"].found.startswith("models.yaml: ")
