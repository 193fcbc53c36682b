"""What Globus Compute knows of an endpoint. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EndpointStatus:
    """An endpoint as the service sees it."""

    state: str
    """``online``, ``offline``, or another word of the service's."""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Its last report, as it came."""

    @property
    def online(self) -> bool:
        """Whether tasks run now. While it is offline they wait for it, up to two weeks."""
        return self.state == "online"


def parse_endpoint(answer: Mapping[str, Any]) -> EndpointStatus:
    """The service's answer about an endpoint's status."""
    details = answer.get("details")
    return EndpointStatus(str(answer.get("status", "unknown")), details if isinstance(details, Mapping) else {})
