"""What a node of Ray makes for itself before Ray starts."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from ray._common.utils import load_class

from gateway_plugin.blocks.host import environment
from gateway_plugin.blocks.job_script import block_script
from gateway_plugin.blocks.ray_tls import tls_environment
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout, block_folder
from gateway_plugin.service import ray_head
from gateway_plugin.tls import make_ray_authority
from tests.unit.blocks.test_script import NAME, node_type, told
from tests.unit.service.test_ray_head import site


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(tmp_path))
    made = Layout(tmp_path / "state")
    made.make()
    make_ray_authority(made, keep=False)
    return made


def test_the_hook_of_the_head_makes_its_certificate_and_no_client_server(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = ray_head.head_env(layout, site(), {})
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    parameters = SimpleNamespace(ray_client_server_port=10001, node_ip_address="10.1.2.3")
    load_class(env["RAY_START_HOOK"])(parameters, True)
    assert parameters.ray_client_server_port is None
    made = x509.load_pem_x509_certificate(Path(env["RAY_TLS_SERVER_CERT"]).read_bytes())
    found = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in found.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1"]
    assert Path(env["RAY_TLS_CA_CERT"]).read_bytes() == layout.ray_ca.read_bytes()
    folder = layout.ray_identity
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_without_an_authority_ray_does_not_start(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.ray_ca_key.unlink()
    for name, value in ray_head.head_env(layout, site(), {}).items():
        monkeypatch.setenv(name, value)
    hook = load_class(ray_head.head_env(layout, site(), {})["RAY_START_HOOK"])
    with pytest.raises(ServiceError, match=r"ray-ca\.key .*gateway up"):
        hook(SimpleNamespace(ray_client_server_port=None, node_ip_address="10.1.2.3"), False)


def test_a_block_has_its_own_certificate_in_its_own_folder(layout: Layout) -> None:
    head = ray_head.head_env(layout, site(), {})
    script = block_script(NAME, node_type(), layout, "10.0.0.1:6390")
    folder = block_folder(layout.run, NAME)
    own = environment(told(script), folder, head)  # as if it had inherited the head's
    assert own.items() >= tls_environment(folder / "tls").items()
    assert own["RAY_START_HOOK"] == head["RAY_START_HOOK"]
    assert str(layout.ray_identity) not in f"{script} {own}"
