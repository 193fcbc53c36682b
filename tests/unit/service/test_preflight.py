"""What is found wrong before anything starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider

from gateway_plugin.catalog import Catalog, parse_catalog
from gateway_plugin.errors import ConfigError
from gateway_plugin.isolation import Isolation
from gateway_plugin.paths import Layout
from gateway_plugin.service.capacity import fit
from gateway_plugin.service.checks import Verdict
from gateway_plugin.service.preflight import (
    before_start,
    engine_isolation,
    every_check,
    failures,
    few_files,
    folders,
    job_scripts,
    open_files,
    packages,
    ports,
    providers,
    python_version,
    runtimes,
    weights,
)
from gateway_plugin.site import Limits, NodeType, Site
from serve.app import node_type_spec
from serve.core.room import holds, need_of


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
    return Site(name="test", node_types=(kind,), port=port, ray_port=20012)


VLLM = parse_catalog({"models": {"m": {"source": "org/model", "memory_gib": 1}}}, "test")


def test_a_port_in_use_is_named_with_its_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = next(ports(site(port)))
        assert found.verdict is Verdict.FAIL
        assert str(port) in found.name
        assert str(os.getpid()) in found.found
        assert "--port" in found.advice
        assert next(ports(site(port), ours=frozenset({port}))).verdict is Verdict.OK


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


@pytest.mark.parametrize(("here", "verdict"), [(True, Verdict.FAIL), (False, Verdict.WARN)])
def test_a_runtime_that_is_not_there_is_named_and_wants_no_vllm_in_this_environment(
    here: bool, verdict: Verdict
) -> None:
    document = {
        "runtimes": {"box": {"python": "/sw/none/bin/python"}, "unused": {"python": "/sw/none/bin/python"}},
        "models": {"m": {"source": "org/model", "memory_gib": 1, "runtime": "box"}},
    }
    catalog = parse_catalog(document, "test")
    (found,) = runtimes(site(engines_on_loopback=here), catalog)
    assert (found.name, found.verdict) == ("runtime box", verdict)
    assert "there is no Python /sw/none/bin/python" in found.found
    assert failures(packages(site(), catalog, installed=lambda module: module != "vllm")) == ()


def test_somebody_elses_state_folder_is_refused_and_a_wide_one_corrected(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir(mode=0o755)
    assert next(folders(Layout(wide))).verdict is Verdict.WARN
    link = tmp_path / "link"
    link.symlink_to(wide)
    assert next(folders(Layout(link))).verdict is Verdict.FAIL


@pytest.mark.parametrize("name", ["my state", 'state"', "$state", "st#ate", "a\\b"])
def test_a_state_folder_that_haproxy_could_not_read_is_refused(tmp_path: Path, name: str) -> None:
    found = {check.name: check for check in folders(Layout(tmp_path / name))}
    assert found["state folder"].verdict is Verdict.FAIL
    assert "HAProxy" in found["state folder"].found
    assert "GATEWAY_STATE" in found["state folder"].advice


def test_a_run_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path / ("x" * 90)))
    assert "socket paths" in [check.name for check in failures(folders(Layout(tmp_path)))]


def test_weights_that_are_not_prepared_say_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_WEIGHTS", str(tmp_path))
    entry = {"source": "prepared:smollm2-135m-instruct", "memory_gib": 1}
    found = failures(weights(parse_catalog({"models": {"m": entry}}, "test")))
    assert "gateway models prepare" in found[0].advice


def test_a_hub_model_without_a_revision_is_a_warning() -> None:
    entries = {"loose": {"source": "org/m", "memory_gib": 1}, "tight": {"source": "org/m@0f3c", "memory_gib": 1}}
    loose, tight = weights(parse_catalog({"models": entries}, "test"))
    assert (loose.verdict, tight.verdict) == (Verdict.WARN, Verdict.OK)
    assert "org/m@COMMIT" in loose.advice


@pytest.mark.parametrize(
    ("fetch", "verdict", "advice"),
    [
        ("by-command", Verdict.WARN, "run `gateway models fetch m`"),
        ("on-request", Verdict.OK, "fetched when the model is asked for"),
        ("by-engine", Verdict.OK, ""),
    ],
)
def test_weights_that_are_not_fetched_prevent_no_start(
    tmp_path: Path, fetch: str, verdict: Verdict, advice: str
) -> None:
    place = site().model_copy(update={"weights_folder": tmp_path, "fetch": fetch})
    (found,) = weights(parse_catalog({"models": {"m": {"source": "org/m@0f3c", "memory_gib": 1}}}, "test"), place)
    assert (found.verdict, found.advice) == (verdict, advice)
    assert (str(tmp_path) in found.found) == bool(advice)
    tmp_path.chmod(0o777)
    open_to_others = weights(parse_catalog({"models": {}}, "test"), place)
    expected = [] if fetch == "by-engine" else [("weights folder", Verdict.WARN)]
    assert [(check.name, check.verdict) for check in open_to_others] == expected


@pytest.mark.parametrize(
    ("wanted", "found", "here", "verdict"),
    [
        ("auto", Isolation("/usr/bin/bwrap"), True, Verdict.OK),
        ("required", Isolation("/usr/bin/bwrap"), True, Verdict.OK),
        ("auto", Isolation(reason="no bwrap"), True, Verdict.WARN),
        ("required", Isolation(reason="no bwrap"), True, Verdict.FAIL),
        ("required", Isolation(reason="no bwrap"), False, Verdict.WARN),  # nodes may have it
        ("off", Isolation("/usr/bin/bwrap"), True, Verdict.WARN),
    ],
)
def test_it_says_whether_engines_are_isolated(wanted: str, found: Isolation, here: bool, verdict: Verdict) -> None:
    chosen = site(engines_on_loopback=here).model_copy(update={"isolate_engines": wanted})
    check = engine_isolation(chosen, found)
    assert (check.name, check.verdict) == ("engine isolation", verdict)
    assert found.reason in check.found
    assert check.advice or verdict is Verdict.OK


def test_an_old_python_is_refused() -> None:
    assert python_version((3, 10)).verdict is Verdict.FAIL
    assert python_version((3, 12)).verdict is Verdict.OK


CPU = NodeType(name="cpu", provider=NoProvider(), cpus=1, engine_memory_gib=4, max_blocks=2)
GPU = NodeType(name="gpu", provider=NoProvider(), cpus=1, gpus=4, gpu_memory_gib=38, max_blocks=1)


def catalog(**models: Mapping[str, object]) -> Catalog:
    return parse_catalog({"models": {name: {"source": "x", **entry} for name, entry in models.items()}}, "test")


@pytest.mark.process
def test_a_provider_whose_jobs_cannot_be_found_again_is_told_before_the_start(tmp_path: Path) -> None:
    good = LocalProvider(launcher=SimpleLauncher(), init_blocks=0, max_blocks=1)
    kinds = (NodeType(name="here", provider=good, cpus=1, engine_memory_gib=1), GPU)
    here, there = providers(Site(name="s", node_types=kinds))
    assert (here.verdict, there.verdict) == (Verdict.OK, Verdict.FAIL)
    assert there.name == "provider of gpu"
    assert "NoProvider" in there.found
    assert "'gpu'" in there.advice
    layout = Layout(tmp_path / "state")
    with pytest.raises(ConfigError, match="provider of gpu: NoProvider") as told:
        before_start(layout, Site(name="s", node_types=kinds), catalog())
    assert "\n" not in told.value.message
    assert there in every_check(layout, Site(name="s", node_types=kinds), catalog())
    assert not layout.state.exists()


@pytest.mark.process
def test_a_state_folder_in_which_no_script_of_a_queue_can_lie_is_told_before_the_start(tmp_path: Path) -> None:
    """Else Ray's monitor would die of it, where nobody looks."""
    local = LocalProvider(launcher=SimpleLauncher())
    kinds = (NodeType(name="here", provider=local, cpus=1, engine_memory_gib=1),)
    queue = NodeType(name="q", provider=SlurmProvider(launcher=SimpleLauncher()), cpus=1, engine_memory_gib=1)
    crooked = Layout(tmp_path / "my state")
    assert not [*job_scripts(crooked, Site(name="s", node_types=kinds))]
    both = Site(name="s", node_types=(*kinds, queue))
    assert not [*job_scripts(Layout(tmp_path / "state"), both)]
    with pytest.raises(ConfigError, match=r"job scripts: .*my state: Parsl does not quote .*; give --state"):
        before_start(crooked, both, Catalog(models=()))


def test_a_provider_of_parsl_without_jobs_of_ours_is_refused() -> None:
    kind = NodeType(name="pbs", provider=PBSProProvider(), cpus=1, engine_memory_gib=1)
    (found,) = providers(Site(name="s", node_types=(kind,)))
    assert found.verdict is Verdict.FAIL
    assert "PBSProProvider" in found.found


@pytest.mark.process
@pytest.mark.parametrize(
    ("entry", "needs"),
    [
        ({"memory_gib": 5}, "5 GiB of engine memory"),
        ({"memory_gib": 4.001}, "4.001 GiB"),
        ({"memory_gib": 39, "gpus": 1}, "1 GPUs with 39 GiB each"),
        ({"memory_gib": 1, "gpus": 5}, "5 GPUs with 1 GiB each"),
    ],
)
def test_a_model_that_fits_nowhere_is_told_with_numbers(tmp_path: Path, entry: dict[str, object], needs: str) -> None:
    place = Site(name="s", node_types=(CPU, GPU))
    found = failures(fit(place, catalog(small={"memory_gib": 1}, big=entry)))
    assert [check.name for check in found] == ["room for big"]
    assert needs in found[0].found
    assert "cpu" in found[0].found
    assert "gpu" in found[0].found
    with pytest.raises(ConfigError, match="room for big"):
        before_start(Layout(tmp_path), place, catalog(big=entry))


def test_what_just_fits_is_well_and_no_blocks_hold_nothing() -> None:
    place = Site(name="s", node_types=(CPU, GPU))
    just = catalog(a={"memory_gib": 4}, b={"memory_gib": 38, "gpus": 4})
    assert [check.verdict for check in fit(place, just)] == [Verdict.OK]
    none = CPU.model_copy(update={"max_blocks": 0})
    (found,) = fit(Site(name="s", node_types=(none,)), catalog(a={"memory_gib": 1}))
    assert found.verdict is Verdict.FAIL
    assert "max_blocks is 0" in found.found


def test_the_rule_is_the_placements() -> None:
    for gib in (3.9, 3.9995, 4.0, 4.0004, 4.0006, 4.1):
        for gpus in (0, 1, 2, 3):
            entry = {"memory_gib": gib, "gpus": gpus}
            kind = NodeType(name="n", provider=NoProvider(), cpus=1, gpus=2, gpu_memory_gib=4, engine_memory_gib=4)
            place, models = Site(name="s", node_types=(kind,)), catalog(m=entry)
            holds_it = holds(node_type_spec(kind), need_of(models.models[0]))
            assert (not failures(fit(place, models))) == holds_it, entry


def test_pins_that_cannot_all_be_loaded_are_a_warning() -> None:
    place = Site(name="s", node_types=(CPU, GPU))
    pinned = {f"m{n}": {"memory_gib": 3, "pinned": True} for n in range(3)}  # 9 GiB, two blocks of 4
    warned = [check for check in fit(place, catalog(**pinned)) if check.verdict is Verdict.WARN]
    assert [check.name for check in warned] == ["room for pins"]
    assert "9.0 GiB of engine memory" in warned[0].found
    assert "8.0" in warned[0].found
    assert "m0, m1, m2" in warned[0].found
    on_gpus = {f"g{n}": {"memory_gib": 38, "gpus": 4, "pinned": True} for n in range(2)}
    assert "GPU memory" in fit(place, catalog(**on_gpus))[-1].found
    del pinned["m2"]
    assert all(check.verdict is Verdict.OK for check in fit(place, catalog(**pinned)))


def test_open_files_say_what_they_allow() -> None:
    few = open_files(Limits(), 4096)
    assert few.verdict is Verdict.WARN
    assert "4096: 1511 callers" in few.found
    assert "266 requests for models that are not loaded" in few.found
    assert "133 of one key" in few.found, "no key can take all places of those that wait"
    assert "the site lets 1000 wait and allows one key 512" in few.found
    assert "lower limits.waiting_requests and limits.in_flight_per_key" in few.advice
    only = open_files(Limits(waiting_requests=100), 6000)
    assert only.verdict is Verdict.WARN
    assert only.found.endswith("; the site allows one key 512")
    assert open_files(Limits(), 20_000).verdict is Verdict.OK
    assert open_files(Limits(waiting_requests=100, in_flight_per_key=100), 6000).verdict is Verdict.OK
    assert "4096: 1511 callers" in few_files(Limits(), 4096), "'up' says it too"
    assert few_files(Limits(), 20_000) == ""
    none = open_files(Limits(), 1000)
    assert none.verdict is Verdict.FAIL
    assert "too low for the edge" in none.found
