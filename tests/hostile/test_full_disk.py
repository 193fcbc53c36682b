"""The state folder is full to the brim, or garbled: models are switched all the same, and everybody is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_plugin.edge.socket_protocol import parse_map
from gateway_plugin.service.discovery import supervisors_of
from tests.support.gateways import Gateway, chat_body, fake_model, gateway, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root alone"),
]

AT_FIRST, THEN = "600m", "8m"
"""'gateway up' wants some hundred MiB; they are taken away once it is up."""
NO_ROOM = "No space left on device"


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    def models(memory: Path) -> dict[str, Any]:
        quick = {name: fake_model(memory, "--load-delay-s", "0.2") for name in ("a", "b")}
        return {**quick, "slow": fake_model(memory, "--load-delay-s", "60", min_residency_s=0)}

    with gateway(models, start=False) as made:
        made.layout.state.mkdir(mode=0o700)
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={AT_FIRST},mode=0700", "tmpfs", str(made.layout.state)]
        if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
            pytest.skip("no tmpfs can be mounted here")
        try:
            made.up()
            subprocess.run(["mount", "-o", f"remount,size={THEN}", str(made.layout.state)], check=True)
            yield made
            made.cli("down")
        finally:
            for process in made.processes():  # whatever it still has open there would keep it mounted
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait(10)
            subprocess.run(["umount", str(made.layout.state)], check=True)


@contextlib.contextmanager
def full(state: Path) -> Iterator[None]:
    """Not one byte is left in ``state``."""
    filler = state / "filler"
    try:
        with filler.open("wb", buffering=0) as written:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while written.write(b"\0" * size):
                        pass
        assert os.statvfs(state).f_bavail == 0
        yield
    finally:
        filler.unlink()


def switched(running: Gateway, model: str) -> float:
    """Seconds until ``model`` answered."""
    began = time.monotonic()
    response = running.chat(model)
    assert response.status_code == 200, f"{model}: {response.text}"
    return time.monotonic() - began


def epoch(running: Gateway) -> int:
    return int(running.status()["epoch"])


def test_models_are_switched_on_a_full_disk_and_everybody_is_told(running: Gateway) -> None:
    switched(running, "a")
    life = epoch(running)
    layout = running.layout
    with full(layout.state):
        took = [switched(running, model) for model in ("b", "a", "b", "a", "b")]
        print("switches on a full disk, s:", [round(seconds, 2) for seconds in took])
        assert max(took) < 30
        status = wait_for(lambda: (found := running.status())["storage"] and found, 5, "status says so")
        assert NO_ROOM in status["storage"]
        assert str(layout.servers_state) in status["unwritten"]
        assert NO_ROOM in running.cli("status").stdout
        with running.client() as client:
            told = wait_for(lambda: (said := client.get("/ready").json()).get("trouble") and said, 10, "/ready says so")
            assert told == {"ready": True, "trouble": status["storage"]}, "a yes is good for a second or two"
            reasons = {model["id"]: model["reason"] for model in client.get("/v1/models").json()["data"]}
            assert all(NO_ROOM in reason for reason in reasons.values()), reasons
        with running.client(headers={"authorization": f"Bearer {running.key}", "x-gateway-wait": "1"}) as client:
            refused = client.post("/v1/chat/completions", json=chat_body("slow"))
        assert refused.status_code == 503
        assert NO_ROOM in refused.json()["error"]["reason"]
        assert str(layout.state) not in refused.text
        created = running.cli("keys", "create", "bob", check=False)
        assert (created.returncode, created.stdout) == (69, "")
        assert "'bob' was not made" in created.stderr
        assert NO_ROOM in created.stderr
        assert "Traceback" not in created.stderr
        assert "bob" not in running.cli("keys", "list").stdout
        running.cli("models", "pin", "a")
        assert switched(running, "a") < 30
        assert epoch(running) == life, "the controller was replaced"
    wait_for(lambda: not running.status()["storage"], 10, lambda: f"written: {running.status()['unwritten']}")
    names = parse_map(layout.models_map.read_text(), numbered=False)
    assert {"a", "b"} <= set(names)
    assert f"/{names['a']}/" in f"/{layout.servers_state.read_text().replace(' ', '/')}/"
    assert json.loads(layout.controller_files.pins.read_text())["pinned"] == ["a"]
    running.cli("keys", "create", "bob")
    replayed = running.cli("controller", "replay", str(layout.controller_files.events), "--json").stdout
    assert replayed
    os.kill(running.status()["pid"], signal.SIGKILL)
    wait_for(lambda: _life(running) > life, 60, "another controller")
    running.cli("models", "unpin", "a")
    for model in ("b", "a"):
        switched(running, model)


def _life(running: Gateway) -> int:
    try:
        return epoch(running)
    except Exception:  # noqa: BLE001 - nobody answers meanwhile
        return 0


def test_a_garbled_record_is_mended_by_the_supervisor_and_without_one_stops_no_down(running: Gateway) -> None:
    layout = running.layout
    before = layout.service_json.read_text()
    layout.service_json.write_text("{")
    wait_for(lambda: layout.service_json.read_text() == before, 5, "the supervisor has written it again")
    assert (layout.state / "service.json.garbled").read_text() == "{"
    (supervisor,) = supervisors_of(layout)
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not supervisors_of(layout), 5, "no supervisor")
    layout.service_json.write_text("")
    layout.supervisor_status.write_text("")
    assert "service.json is garbled" in running.cli("status", check=False).stdout
    ended = running.cli("down")
    assert "service.json.garbled.2" in ended.stderr
    assert not running.processes()
