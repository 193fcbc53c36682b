"""A whole gateway whose models run in runtimes: one in a container, one whose Python is gone when it is asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.gateways import Gateway, fake_model, gateway
from tests.support.images import ROOT, charliecloud, missing

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(bool(missing()), reason=f"no container: {missing()}"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("runtimes")
    box = charliecloud(folder / "image").model_dump(mode="json", exclude={"name"})
    python = folder / "python"
    python.symlink_to(sys.executable)
    with (
        pytest.MonkeyPatch.context() as patch,
        gateway(lambda memory: {"boxed": fake_model(memory)}, start=False) as made,
    ):
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # homes of containers
        made.environment["XDG_CACHE_HOME"] = str(folder / "cache")
        document = yaml.safe_load(made.catalog.read_text())
        entry = document["models"]["boxed"]
        entry["command"][0] = "{python}"
        entry["runtime"] = "box"
        document["models"]["elsewhere"] = {**entry, "runtime": "gone"}
        document["runtimes"] = {"box": box, "gone": {"python": str(python), "env": {"PYTHONPATH": str(ROOT)}}}
        made.catalog.write_text(yaml.safe_dump(document))
        made.up()
        python.unlink()
        yield made


def test_a_model_in_a_container_answers(running: Gateway) -> None:
    answer = running.chat("boxed")
    assert answer.status_code == 200, answer.text
    (pid,) = running.engine_pids().values()
    assert Path(f"/proc/{pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()


def test_a_runtime_that_is_gone_fails_its_model_within_seconds_in_its_words(running: Gateway) -> None:
    began = time.monotonic()
    answer = running.chat("elsewhere")
    assert answer.status_code == 503
    assert time.monotonic() - began < 60, "seconds, not load_timeout"
    assert "runtime 'gone': there is no Python" in running.cli("models", "list", "--json").stdout
    wrong = json.loads(running.cli("doctor", "--json", check=False).stdout)
    (check,) = [check for check in wrong if check["name"] == "runtime gone"]
    assert check["verdict"] == "fail"
    assert "there is no Python" in check["found"]
