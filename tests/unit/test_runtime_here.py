"""A runtime on this node: what is bound, what is looked for before the start, and who hides the gateway's folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ServiceError
from gateway_plugin.isolation import Hidden, Isolation
from gateway_plugin.paths import Layout
from gateway_plugin.runtimes import Runtime
from gateway_plugin.runtimes.containers import Start
from gateway_plugin.runtimes.here import confined, missing, start_in_runtime

BWRAP = Isolation("/usr/bin/bwrap")


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USER", "u")
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "home").mkdir(mode=0o700)
    made = Layout(tmp_path / "home" / "state")
    made.make()
    return made


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH with programs of that name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("podman", "apptainer", "ch-run", "shifter", "enroot"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def model(kind: str = "podman", source: str = "o/m", container: dict[str, Any] | None = None, **fields: Any) -> Model:
    box = Runtime.model_validate({"name": "box", "container": {"kind": kind, "image": "vllm", **(container or {})}})
    return Model.model_validate({"name": "m", "source": source, "memory_gib": 1, "runtime": box, **fields})


def start(layout: Layout, entry: Model, env: dict[str, str], argv: tuple[str, ...] = ("python3",)) -> Start:
    log, tls = layout.engine_logs / "e1.log", (layout.engine_key, layout.ca)
    return start_in_runtime(argv, env, entry, layout, log, tls, entry.source, entry.gpus)


def bound(found: Start) -> list[str]:
    return [found.argv[at + 1] for at, word in enumerate(found.argv) if word == "--volume"]


def test_a_snapshot_of_a_hub_is_bound_with_the_blobs_that_it_links_to(
    layout: Layout, programs: str, tmp_path: Path
) -> None:
    repository = tmp_path / "hub/models--o--m"
    commit = repository / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    snapshot = str(commit)
    found = start(layout, model(source=snapshot), {"PATH": programs}, ("python3", "--model", snapshot))
    assert f"{repository}:{repository}:ro" in bound(found)
    assert not any(f"{snapshot}:" in bind for bind in bound(found))
    assert "HF_HOME" not in found.env


def test_weights_of_a_hub_come_from_the_owners_cache(layout: Layout, programs: str, tmp_path: Path) -> None:
    found = start(layout, model(), {"PATH": programs})
    cache = tmp_path / "home/.cache/huggingface"
    assert found.env["HF_HOME"] == str(cache)
    assert f"{cache}:{cache}" in bound(found)
    given = start(layout, model(), {"PATH": programs, "HF_HOME": str(tmp_path)})
    assert given.env["HF_HOME"] == str(tmp_path)


def test_nothing_that_arguments_or_variables_name_shows_the_gateways_folders(
    layout: Layout, programs: str, tmp_path: Path
) -> None:
    shown = tmp_path / "templates"
    shown.mkdir()
    (shown / "chat.jinja").touch()
    home, state = tmp_path / "home", layout.state
    argv = ("python3", "--chat-template", f"{shown}/chat.jinja", "--a", str(home), "--b", str(tmp_path), str(state))
    env = {"PATH": programs, "ROOT": str(tmp_path), "STATE": f"{state}/keys.json", "DATA": str(shown)}
    binds = bound(start(layout, model(), env, argv))
    assert f"{shown}:{shown}" in binds
    places = {Path(bind.partition(":")[0]) for bind in binds}
    seen = [place for place in places if state.is_relative_to(place) or layout.run.is_relative_to(place)]
    assert seen == []
    assert {place for place in places if place.is_relative_to(state)} == {layout.engine_key, layout.ca}


def test_its_folders_are_private(layout: Layout, programs: str) -> None:
    found = start(layout, model(), {"PATH": programs})
    for folder in (Path(found.scratch), Path(found.written[0])):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert found.env["GATEWAY_ENGINE"] == str(layout.engine_logs / "e1.log")


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ({"python": "/sw/none/python"}, "there is no Python /sw/none/python on this node"),
        ({"container": {"kind": "podman-hpc", "image": "x"}}, "there is no podman-hpc on PATH on this node"),
        ({"container": {"kind": "apptainer", "image": "/sw/x.sif"}}, "there is no image /sw/x.sif on this node"),
        ({"container": {"kind": "podman", "image": "x", "binds": ["/none:/in"]}}, "there is no /none on this node"),
        ({"container": {"kind": "podman", "image": "x"}}, ""),
        ({"container": {"kind": "apptainer", "image": "vllm.sif"}}, "there is no image vllm.sif on this node"),
        ({"container": {"kind": "charliecloud", "image": "vllm"}}, ""),
        (
            {"modules": ["apptainer"], "container": {"kind": "singularity", "image": "/usr"}},
            "",
        ),  # a module has it
        ({"modules": ["vllm"]}, ""),
    ],
)
def test_what_is_not_there_is_said_before_the_start(runtime: dict[str, Any], says: str, programs: str) -> None:
    found = missing(Runtime.model_validate({"name": "box", **runtime}), {"PATH": programs})
    assert found.startswith(says) if says else found == ""


def wrapped(layout: Layout, entry: Model, wanted: str = "auto") -> bool:
    return confined(BWRAP, wanted, entry, layout, "o/m", Start((), {})) != ()


def test_a_container_hides_the_gateways_folders_itself(layout: Layout) -> None:
    for kind in ("apptainer", "podman", "podman-hpc", "enroot"):
        assert not wrapped(layout, model(kind))
        assert not wrapped(layout, model(kind), "required")


def test_a_bind_that_shows_them_is_refused_where_isolation_is_required(layout: Layout) -> None:
    for bind in (str(layout.state), str(layout.state.parent), f"{layout.run}:/x"):
        entry = model(container={"binds": [bind]})
        assert not wrapped(layout, entry)
        with pytest.raises(ServiceError, match="its container has"):
            wrapped(layout, entry, "required")


def test_shifter_shows_home_folders(layout: Layout) -> None:
    assert not wrapped(layout, model("shifter"))
    with pytest.raises(ServiceError, match="Shifter does not run inside bubblewrap"):
        wrapped(layout, model("shifter"), "required")


def test_an_entry_that_is_not_to_be_isolated_is_refused_in_a_container_too(layout: Layout) -> None:
    with pytest.raises(ServiceError, match="isolated: false"):
        wrapped(layout, model(isolated=False), "required")


def test_bubblewrap_is_around_charliecloud_and_pythons(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr("gateway_plugin.isolation.hidden_here", lambda layout, more: Hidden())
    assert wrapped(layout, model("charliecloud"))
    python = Runtime(name="own", python="/sw/env/bin/python")
    assert wrapped(layout, model().model_copy(update={"runtime": python}))
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert not wrapped(layout, model("charliecloud"))
