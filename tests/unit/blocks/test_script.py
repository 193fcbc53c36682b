from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from gateway_plugin.blocks.cluster_yaml import NODE_IDLE_S, cluster_yaml
from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.leaving import Settings
from gateway_plugin.paths import Layout, block_folder
from gateway_plugin.site import NodeType, Site
from tests.support.queue import QueueProvider, Scheduler

NAME = "gw-gpu-0123abcd"


def node_type(**values: object) -> NodeType:
    given = {"name": "gpu", "provider": QueueProvider(Scheduler()), "cpus": 16, "gpus": 4, "gpu_memory_gib": 38.0}
    return NodeType.model_validate({**given, **values})


def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / 'it\'s "my" $HOME `state`')


def told(script: str) -> Settings:
    """What the block's program is told."""
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("set -- ")))
    return Settings.parse(words[words.index("gateway_plugin.blocks.host") + 1])


@pytest.mark.process
def test_it_is_valid_bash_whatever_the_paths_hold(tmp_path: Path) -> None:
    script = block_script(NAME, node_type(), layout(tmp_path), "10.0.0.1:6390", "/opt/my env/bin/python", "/opt/my env")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "mein haus" not in script


@pytest.mark.process
def test_values_reach_the_job_as_they_are(tmp_path: Path) -> None:
    place = layout(tmp_path)
    script = block_script(NAME, node_type(worker_init="export SITE=1"), place, "10.0.0.1:6390")
    shown = subprocess.run(
        ["bash"],
        input=script.replace("exec >>", "true >>/dev/null #").replace(
            'exec "$@"', """exec printf '%s\\n' "$SITE/$RAY_gcs" "$@" """
        ),
        text=True,
        check=True,
        capture_output=True,
        env={"RAY_gcs": "rocksdb", "PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()
    # The head's own settings, which a local block inherits, are gone.
    assert shown[:3] == ["1/", "python", "-m"]
    assert Settings.parse(shown[4]) == told(script)
    assert told(script).state == str(place.state)
    assert told(script).environment["RAY_AUTH_TOKEN_PATH"] == str(place.ray_token)


def test_it_carries_the_path_of_the_token_and_not_the_token(tmp_path: Path) -> None:
    place = Layout(tmp_path)
    place.node.mkdir()
    place.ray_token.write_text("sesame")
    script = block_script(NAME, node_type(), place, "10.0.0.1:6390")
    assert "sesame" not in script
    assert told(script).environment["RAY_AUTH_TOKEN_PATH"] == str(place.ray_token)
    assert told(script).environment["RAY_AUTH_MODE"] == "token"


def test_it_says_what_the_node_holds_and_who_it_is(tmp_path: Path) -> None:
    script = block_script(NAME, node_type(), Layout(tmp_path), "10.0.0.1:6390")
    assert script.startswith("umask 077\nulimit -c 0")
    assert len(script.splitlines()) <= 25
    assert {"--num-cpus=16", "--num-gpus=4", '--resources={"gateway_gpu": 1}'} <= set(told(script).ray)
    assert told(script).environment.items() >= {
        ("RAY_CLOUD_INSTANCE_ID", NAME),
        ("RAY_NODE_TYPE_NAME", "gpu"),
        ("RAY_gcs_rpc_server_reconnect_timeout_s", "600"),
    }


def test_a_site_may_say_how_a_node_finds_its_address(tmp_path: Path) -> None:
    script = block_script(NAME, node_type(node_address="hostname -I | cut -d' ' -f1"), Layout(tmp_path), "h:1")
    assert "ADDRESS=$(hostname -I | cut -d' ' -f1)" in script


def test_ray_s_sockets_fit_in_a_block_s_folder() -> None:
    # The longest: a ten-digit user id, a type of 16 letters, Ray's longest session name. AF_UNIX ends at 107.
    folder = block_folder(Path("/tmp/gw-4294967295-01234567"), "gw-abcdefghijklmnop-01234567")
    assert len(f"{folder}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107


@pytest.mark.parametrize("count", [1, 2])
def test_ray_accepts_the_autoscaler_s_file(tmp_path: Path, count: int) -> None:
    types = tuple(node_type(name=f"gpu{n}", max_blocks=3) for n in range(count))
    site = Site(name="here", node_types=types)
    document = yaml.safe_load(yaml.safe_dump(cluster_yaml(site, "local", Layout(tmp_path), "10.0.0.1:6390")))
    config = AutoscalingConfig(document, skip_content_hash=True)
    shapes = config.get_node_type_configs()
    assert shapes["gpu0"].max_worker_nodes == 3
    assert shapes["gpu0"].min_worker_nodes == 0
    assert shapes["gpu0"].resources == {"CPU": 16, "GPU": 4, "gateway_gpu0": 1}
    assert config.get_max_num_worker_nodes() == 3 * count
    assert config.get_idle_timeout_s() == pytest.approx(NODE_IDLE_S)
    assert config.get_head_node_type() == "head"
    assert config.get_provider_config()["state"] == str(tmp_path)
