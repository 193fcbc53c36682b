"""``Client`` and ``AsyncClient`` of an endpoint, with what belongs to Globus Compute alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gateway_plugin.asyncio_client import AsyncClient
from gateway_plugin.client import REQUEST_TIMEOUT_S, Client
from gateway_plugin.globus.client.batches import Limits, Pace
from gateway_plugin.globus.client.channel import GlobusChannel
from gateway_plugin.globus.client.transport import Transport

if TYPE_CHECKING:
    from globus_compute_sdk import Client as SdkClient


class GlobusClient(Client):
    """``Client(endpoint=ID)``; endpoint and function are also found in the environment.

    Args:
        timeout_s: of one request, at most six hours.
        others: as of ``GlobusChannel``.
    """

    def __init__(
        self,
        endpoint_id: str | None = None,
        function_id: str | None = None,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        task_group_id: str | None = None,
        client: SdkClient | None = None,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        pace: Pace | None = None,
        transport: Transport | None = None,
    ) -> None:
        channel = GlobusChannel(
            endpoint_id, function_id, task_group_id=task_group_id, client=client, options=options, limits=limits,
            pace=pace, transport=transport,
        )  # fmt: skip
        super().__init__(channel=channel, timeout_s=timeout_s)
        self._globus = channel
        self.endpoint_id, self.task_group_id = channel.url, channel.group
        """``task_group_id``: of everything but maps, which have one each."""

    @property
    def tasks_sent(self) -> int:
        """Tasks that this client has sent, repetitions included."""
        return self._globus.batcher.tasks_sent


class AsyncGlobusClient(AsyncClient):
    """``AsyncClient(endpoint=ID)``, with the arguments of ``GlobusClient``."""

    sync: GlobusClient
    _make = GlobusClient
