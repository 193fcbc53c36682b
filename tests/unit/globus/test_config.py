"""An endpoint's files: closed for everything but the one function, whatever it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway_plugin.errors import ConfigError, ServiceError
from gateway_plugin.globus import function_registry as manifest
from gateway_plugin.globus.endpoint import config_files as config
from gateway_plugin.globus.endpoint.config_files import EndpointSettings
from gateway_plugin.globus.function import KEPT_S, SWEEP_S

OWNER = "11111111-aaaa-4444-8888-000000000001"
FUNCTION = "22222222-bbbb-4444-8888-000000000002"


def settings(**more: Any) -> EndpointSettings:
    given: dict[str, Any] = {
        "name": "gw",
        "url": "http://127.0.0.1:8000",
        "key_file": "~/k",
        "answers": "/tmp/a",
    } | more
    return EndpointSettings(**given)


def test_only_the_registered_function_is_allowed() -> None:
    document = yaml.safe_load(config.core_yaml(settings(), (FUNCTION,)))
    assert document["allowed_functions"] == [FUNCTION]
    assert "identity_mapping_config_path" not in document


def test_a_multi_user_endpoint_names_its_mapping_and_whom_to_write_to() -> None:
    mapped = settings(identity_mapping=Path("/etc/map.json"), contact="ops@example.org")
    document = yaml.safe_load(config.core_yaml(mapped, (FUNCTION,)))
    assert document["identity_mapping_config_path"] == "/etc/map.json"
    assert document["email"] == "ops@example.org"
    with pytest.raises(ConfigError, match="--contact"):
        settings(identity_mapping=Path("/etc/map.json"))


def test_a_user_endpoint_takes_json_alone_and_tries_a_lost_pack_once_more() -> None:
    engine = yaml.safe_load(config.template(settings(owner=OWNER)))["engine"]
    assert [name.rsplit(".", 1)[1] for name in engine["allowed_serializers"]] == ["JSONData", "PureSourceTextInspect"]
    assert engine["max_retries_on_system_failure"] == 1
    assert engine["address"] == "127.0.0.1"


def test_workers_live_until_what_they_kept_is_removed() -> None:
    document = yaml.safe_load(config.template(settings(owner=OWNER, heartbeat_s=5.0)))
    needed = KEPT_S + 2 * SWEEP_S
    assert document["engine"]["job_status_kwargs"]["max_idletime"] > needed
    assert document["idle_heartbeats_soft"] * 5.0 > needed


def test_the_template_knows_no_variable_of_the_callers() -> None:
    text = config.template(settings(owner=OWNER))
    assert text.count("{{") == 1
    assert f"_GC.mapped_identity.globus.id or '{OWNER}'" in text.replace("''", "'").replace('\\"', '"')


def test_the_schema_allows_no_option() -> None:
    assert json.loads(config.schema())["additionalProperties"] is False
    assert json.loads(config.schema())["properties"] == {}


def test_the_gateways_secrets_do_not_reach_the_endpoints_process() -> None:
    base = {"GATEWAY_API_KEY": "s", "RAY_AUTH_TOKEN": "s", "VLLM_API_KEY": "s", "HOME": "/h", "PATH": "/usr/bin"}
    made = config.process_environment(base, Path("/v"), Path("/g"))
    assert made == {"HOME": "/h", "PATH": "/v/bin:/usr/bin", "GLOBUS_COMPUTE_USER_DIR": "/g"}


@pytest.mark.parametrize("name", ["", "Gateway", "a b", "../x", "-x", "a" * 40, "x;y"])
def test_a_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        settings(name=name)


def test_an_owner_is_an_identity_and_nothing_that_a_shell_reads() -> None:
    with pytest.raises(ConfigError, match="identity"):
        settings(owner='"; touch x; "')


def test_the_site_file_holds_no_secret_and_leaves_out_what_is_not_set() -> None:
    assert config.site_document(settings()) == {
        "version": 1, "url": "http://127.0.0.1:8000", "key_file": "~/k", "answers": "/tmp/a",
    }  # fmt: skip


def test_the_manifest_knows_a_function_by_its_text(tmp_path: Path) -> None:
    path = tmp_path / "folder/functions.json"
    assert manifest.read(path) == ()
    text = manifest.source()
    function = manifest.Function(version=manifest.version_of(text), sha256=manifest.digest_of(text), id=FUNCTION)
    manifest.write(path, (function,))
    assert manifest.registered(manifest.read(path), text) == function
    assert manifest.registered(manifest.read(path), text + "\n") is None, "another text is registered anew"
    path.write_text("{")
    with pytest.raises(ServiceError, match="configure"):
        manifest.read(path)
    with pytest.raises(ServiceError, match="FUNCTION_VERSION"):
        manifest.version_of("def infer(): ...")
