"""What is found wrong before anything starts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gateway_plugin.catalog import parse_catalog
from gateway_plugin.layout import Layout
from gateway_plugin.service.preflight import (
    Verdict,
    bind_problem,
    failures,
    folders,
    packages,
    port_holder,
    ports,
    python_version,
    weights,
)
from gateway_plugin.site import NodeType, Site


class NoProvider:
    nodes_per_block = 1

    def submit(self) -> None: ...
    def status(self) -> None: ...
    def cancel(self) -> None: ...


def site(port: int = 20011, worker_init: str = "", engines_on_loopback: bool = True) -> Site:
    kind = NodeType(
        name="local",
        provider=NoProvider(),
        cpus=1,
        engine_memory_gib=1,
        worker_init=worker_init,
        engines_on_loopback=engines_on_loopback,
    )
    return Site(name="test", node_types=(kind,), port=port, ray_port=20012, serve_port=20013)


VLLM = parse_catalog({"models": {"m": {"source": "org/model", "memory_gib": 1}}}, "test")


def test_a_port_in_use_is_named_with_its_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = ports(site(port))[0]
        assert found.verdict is Verdict.FAIL
        assert str(port) in found.name
        assert str(os.getpid()) in found.found
        assert "--port" in found.advice
        assert ports(site(port), ours=frozenset({port}))[0].verdict is Verdict.OK
        assert port_holder(port) == os.getpid()
    assert bind_problem("127.0.0.1", port) is None
    assert port_holder(port) is None


def test_a_missing_package_says_what_to_install() -> None:
    found = failures(packages(site(), VLLM, installed=lambda module: module != "ray"))
    assert [check.name for check in found] == ["package ray"]
    assert "pip install" in found[0].advice


@pytest.mark.parametrize(
    ("place", "missing"),
    [
        (site(), ["package vllm"]),
        (site(worker_init="module load vllm"), []),
        (site(engines_on_loopback=False), []),
    ],
)
def test_vllm_is_wanted_only_where_engines_run_in_this_environment(place: Site, missing: list[str]) -> None:
    found = failures(packages(place, VLLM, installed=lambda module: module != "vllm"))
    assert [check.name for check in found] == missing


def test_somebody_elses_state_folder_is_refused_and_a_wide_one_corrected(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir(mode=0o755)
    assert folders(Layout(wide))[0].verdict is Verdict.WARN
    link = tmp_path / "link"
    link.symlink_to(wide)
    assert folders(Layout(link))[0].verdict is Verdict.FAIL


def test_a_run_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path / ("x" * 90)))
    assert "socket paths" in [check.name for check in failures(folders(Layout(tmp_path)))]


def test_weights_that_are_not_prepared_say_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_WEIGHTS", str(tmp_path))
    entry = {"source": "prepared:smollm2-135m-instruct", "memory_gib": 1}
    found = failures(weights(parse_catalog({"models": {"m": entry}}, "test")))
    assert "gateway models prepare" in found[0].advice


def test_an_old_python_is_refused() -> None:
    assert python_version((3, 10)).verdict is Verdict.FAIL
    assert python_version((3, 12)).verdict is Verdict.OK
