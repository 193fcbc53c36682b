"""What ``doctor`` asks of runtimes on a node."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.catalog import parse_catalog
from gateway_plugin.paths import Layout
from gateway_plugin.runtimes import Runtime
from gateway_plugin.runtimes.here import look
from gateway_plugin.runtimes.versions import Seen, Tried, argv_of, seen, wanted
from tests.support.agents import private_layout
from tests.support.images import charliecloud, missing

DOCUMENT = {
    "runtimes": {
        "env": {"python": "/sw/env/bin/python"},
        "llama": {"container": {"kind": "apptainer", "image": "/sw/llama.sif"}},
        "unused": {"python": "/sw/x"},
    },
    "models": {
        "a": {"source": "o/a", "memory_gib": 1, "runtime": "env", "gpus": 2},
        "b": {"source": "o/b", "memory_gib": 1, "runtime": "env", "gpus": 4},
        "c": {
            "source": "o/c",
            "memory_gib": 1,
            "runtime": "llama",
            "engine": "command",
            "command": ["/opt/llama-server", "--port", "{port}"],
        },
        "d": {"source": "o/d", "memory_gib": 1},
    },
}


def test_the_runtimes_of_a_catalog_with_what_its_entries_want() -> None:
    env, llama, own = wanted(parse_catalog(DOCUMENT, "test")).tried
    assert (env.runtime.name, env.packages, env.programs, env.gpus) == ("env", ("vllm",), (), 4)
    assert (llama.runtime.name, llama.packages, llama.programs) == ("llama", (), ("/opt/llama-server",))
    assert (own.runtime.name, own.packages) == ("", ("vllm",))
    assert argv_of(env, "/gw/python")[0] == "/sw/env/bin/python"
    assert argv_of(own, "/gw/python")[0] == "/gw/python"
    assert argv_of(llama, "/gw/python")[0] == "sh"


def test_what_a_runtime_printed() -> None:
    tried = Tried(runtime=Runtime(name="env"), packages=("vllm",))
    versions = {"python": "3.12.3", "vllm": "0.32.0"}
    printed = f"a module's greeting\ngateway-plugin:{json.dumps(versions)}\n"
    assert seen(tried, 0, printed, "") == Seen(versions=versions)
    assert seen(tried, 1, "", "Traceback\n  x\nLmod has detected an error\n").problem.endswith(
        "Lmod has detected an error"
    )
    assert seen(tried, 3, "", "").problem == "exit code 3"
    assert seen(tried, 0, "hello", "").problem == "its Python printed no versions"
    assert "has no vllm" in seen(tried, 0, 'gateway-plugin:{"python": "3.9"}', "").problem


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Layout]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with private_layout() as made:
        yield made


@pytest.mark.process
def test_the_versions_of_this_environment(layout: Layout) -> None:
    found = look(Tried(runtime=Runtime(name=""), packages=("torch", "vllm")), layout, os.environ, 30)
    assert found.problem == ""
    assert found.versions["python"] == sys.version.split()[0]
    assert {"torch", "vllm"} <= set(found.versions)


@pytest.mark.process
def test_a_runtime_that_hangs_is_given_up(layout: Layout, tmp_path: Path) -> None:
    python = tmp_path / "python"
    # As a container's monitor does, one process leaves the group and keeps the output open.
    python.write_text(f"#!/bin/sh\nsetsid sleep 20 & echo $! > {tmp_path}/pid; sleep 600 & wait\n")
    python.chmod(0o755)
    began = time.monotonic()
    found = look(Tried(runtime=Runtime(name="slow", python=str(python))), layout, os.environ, 2)
    assert found.problem == "it did not start within 2 s"
    assert time.monotonic() - began < 15, "not as long as what keeps the output open"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.process
def test_two_trials_on_one_node_have_containers_of_their_own(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replaces an earlier container of its name, and removes it and its folder at its end."""
    program = tmp_path / "bin/podman"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$*" | tr " " "\\n" | grep -A1 -e --name | tail -1 >>{tmp_path}/names\n')
    program.chmod(0o755)
    box = Runtime.model_validate({"name": "box", "container": {"kind": "podman", "image": "vllm"}})
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for _ in range(2):
        look(Tried(runtime=box), layout, os.environ, 30)
    first, second = (tmp_path / "names").read_text().split()
    assert first.startswith(f"gateway-{layout.run.name}-look-box-")
    assert first != second


@pytest.mark.process
@pytest.mark.skipif(bool(missing()), reason=f"no container: {missing()}")
def test_the_versions_in_a_container_leave_no_folder(layout: Layout, tmp_path: Path) -> None:
    box = charliecloud(tmp_path / "image")
    found = look(Tried(runtime=box, packages=("torch",)), layout, os.environ, 30)
    assert found.problem == ""
    assert found.versions["python"] == sys.version.split()[0]
    assert not layout.scratch.exists()
