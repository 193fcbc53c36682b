"""Waiting for a model: ``acquire`` at the controller, asked again when one restarts, cancelled with its client."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from gateway_plugin.errors import GatewayError, WaitDeadline

log = logging.getLogger("gateway.ingress")

_AGAIN_S = 0.25

LOST = (RayError, RayServeException)
"""A controller that died, restarts, or cannot be reached yet."""


@dataclass(frozen=True)
class Granted:
    """The model may be asked for. ``deaths``: when its engines last died, wall-clock seconds."""

    deaths: tuple[float, ...]


class Waiting:
    """The ingress's side of ``acquire``."""

    def __init__(self, controller: Any, wait_max_s: float) -> None:
        self._controller = controller
        self._wait_max_s = wait_max_s

    def deadline(self) -> float:
        """Monotonic seconds at which a request that came now gives up."""
        return time.monotonic() + self._wait_max_s

    async def acquire(self, model: str, deadline: float, *, not_routed: bool = False) -> Granted:
        """Wait until ``model`` is ready. Raises the ``GatewayError`` that says why it will not be."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitDeadline(
                    f"The model '{model}' was not ready within the {self._wait_max_s:.0f} s that a request may wait.",
                    retry_after_s=10.0,
                    state="waiting",
                )
            ticket = uuid.uuid4().hex
            response = self._controller.acquire.remote(ticket, model, left, not_routed)
            try:
                answer: dict[str, Any] = await asyncio.wait_for(response, left + 5.0)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except TimeoutError:
                response.cancel()
                continue
            except BackPressureError:
                await asyncio.sleep(_AGAIN_S)
                continue
            except LOST as error:
                log.warning("controller-lost", extra={"error": type(error).__name__})
                await asyncio.sleep(_AGAIN_S)
                continue
            if isinstance(answer["error"], GatewayError):
                raise answer["error"]
            return Granted(tuple(answer["deaths"]))

    async def outlook(self, model: str) -> tuple[str, float | None]:
        """State and expected seconds of a model that is waited for; ``waiting`` when the controller is away."""
        try:
            found = await asyncio.wait_for(self._controller.outlook.remote(model), 2.0)
        except (TimeoutError, *LOST):
            return "waiting", None
        return found["state"], found["eta_s"]
