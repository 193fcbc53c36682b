"""The name under which ``GlobusClient`` was documented first; see ``gateway_plugin.globus``."""

from __future__ import annotations

from gateway_plugin.globus.client.client import AsyncGlobusClient, GlobusClient

__all__ = ["AsyncGlobusClient", "GlobusClient"]
