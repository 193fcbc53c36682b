"""The first documented module name of ``GlobusClient``; see ``gateway_plugin.globus``."""

from __future__ import annotations

from gateway_plugin.globus.client.client import AsyncGlobusClient, GlobusClient

__all__ = ["AsyncGlobusClient", "GlobusClient"]
