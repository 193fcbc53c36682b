"""Contents of an endpoint's files: everything closed. Pure text.

A caller chooses nothing: the template has no variable of the caller's, the schema allows no option, only registered
functions run, and only JSON goes in and out (an allowed function with a pickled argument would run anything).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gateway_plugin.errors import ConfigError
from gateway_plugin.globus.function import CALLER_VARIABLE, KEPT_S, SITE_VARIABLE, SWEEP_S

ENDPOINT_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
IDENTITY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DEFAULT_KEY_FILE = "~/.config/gateway-plugin/endpoint.key"
IDLE_S = round(KEPT_S + 5 * SWEEP_S)
"""Idle time after which a user's workers end: once their kept answers are removed."""
_SERIALIZERS = ("globus_compute_sdk.serialize.JSONData", "globus_compute_sdk.serialize.PureSourceTextInspect")


@dataclass(frozen=True)
class EndpointSettings:
    """Settings given to ``gateway endpoint configure``, and those it determined."""

    name: str
    url: str
    """The gateway's URL, without ``/v1``."""
    answers: str
    """Where answers are kept, before ``-UID``: below the local user's own state home, or a whole path."""
    key_file: str = DEFAULT_KEY_FILE
    """``~`` is the home of the local user that the function runs as."""
    input_folder: str | None = None
    ca: str | None = None
    """Certificate of the authority that signed the gateway's, where it is not a public one."""
    workers: int = 4
    """Packs worked on at a time, each local user."""
    heartbeat_s: float = 15.0
    identity_mapping: Path | None = None
    contact: str | None = None
    """E-mail address; Globus wants one for a multi-user endpoint."""
    owner: str | None = None
    """Globus identity of the user who configured it: the only one that a single-user endpoint serves."""

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for invalid settings."""
        if not ENDPOINT_NAME.fullmatch(self.name):
            raise ConfigError(f"An endpoint's name matches {ENDPOINT_NAME.pattern}, got {self.name!r}.")
        if self.identity_mapping is not None and not self.contact:
            raise ConfigError("A multi-user endpoint needs --contact, an e-mail address for its users.")
        if self.owner is not None and not IDENTITY.fullmatch(self.owner):
            raise ConfigError(f"{self.owner!r} is not a Globus identity.")


def with_owner(settings: EndpointSettings, owner: object) -> EndpointSettings:
    """As configured by the Globus identity ``owner``."""
    return settings if settings.identity_mapping is not None else replace(settings, owner=str(owner))


def site_document(settings: EndpointSettings) -> dict[str, Any]:
    """The function's site file: ``gateway_plugin.globus.function.read_site``."""
    optional = {"input_folder": settings.input_folder, "ca": settings.ca}
    return {
        "version": 1,
        "url": settings.url,
        "key_file": settings.key_file,
        "answers": settings.answers,
        **{name: value for name, value in optional.items() if value is not None},
    }


def core_yaml(settings: EndpointSettings, functions: tuple[str, ...]) -> str:
    """``config.yaml``: of the process that starts one user endpoint for every local user."""
    document: dict[str, Any] = {
        "display_name": settings.name,
        "allowed_functions": list(functions),
        "heartbeat_period": settings.heartbeat_s,
    }
    if settings.identity_mapping is not None:
        document |= {"identity_mapping_config_path": str(settings.identity_mapping), "email": settings.contact}
    return yaml.safe_dump(document, sort_keys=False)


def template(settings: EndpointSettings) -> str:
    """``user_config_template.yaml.j2``: of a user endpoint.

    The engine is Parsl's, with workers that are processes of their own: only it survives the death of a worker, and
    gives the pack to another, once. It checks them every 2 s instead of 30.
    """
    owner = settings.owner or ""
    document = {
        "heartbeat_period": settings.heartbeat_s,
        "idle_heartbeats_soft": round(IDLE_S / settings.heartbeat_s),
        "engine": {
            "type": "GlobusComputeEngine",
            "address": "127.0.0.1",
            "encrypted": True,
            "allowed_serializers": list(_SERIALIZERS),
            "max_workers_per_node": settings.workers,
            "cores_per_worker": 0.01,  # they wait for the gateway, they do not compute
            "max_retries_on_system_failure": 1,
            "heartbeat_period": 2,
            "heartbeat_threshold": 20,
            "job_status_kwargs": {"max_idletime": IDLE_S, "strategy_period": 1},
            "provider": {
                "type": "LocalProvider",
                "init_blocks": 1,
                "min_blocks": 1,
                "max_blocks": 1,
                "worker_init": f"export {CALLER_VARIABLE}=\"{{{{ _GC.mapped_identity.globus.id or '{owner}' }}}}\"",
            },
        },
    }
    return yaml.safe_dump(document, sort_keys=False, width=1000)


def schema() -> str:
    """``user_config_schema.json``: no option at all."""
    return json.dumps({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    })  # fmt: skip


def user_environment(site_file: Path, venv: Path) -> str:
    """``user_environment.yaml``: of user endpoints and their workers."""
    path = f"{venv / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    return yaml.safe_dump({SITE_VARIABLE: str(site_file), "PATH": path}, sort_keys=False)


def process_environment(base: Mapping[str, str], venv: Path, globus_folder: Path) -> dict[str, str]:
    """Of the endpoint's own process: none of the gateway's secrets, its own programs first."""
    kept = {name: value for name, value in base.items() if not name.startswith(("GATEWAY_", "VLLM_", "RAY_"))}
    path = f"{venv / 'bin'}:{base.get('PATH', '/usr/bin:/bin')}"
    return {**kept, "PATH": path, "GLOBUS_COMPUTE_USER_DIR": str(globus_folder)}
