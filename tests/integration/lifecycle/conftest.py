"""One gateway that is brought up and down, its folders kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.service.discovery import supervisors_of
from tests.support.gateways import Gateway, fake_model, gateway


def models(memory: Path) -> dict[str, Any]:
    return {
        "alpha": fake_model(memory, memory_gib=0.5),
        "beta": fake_model(memory, memory_gib=0.2),
        "warm": fake_model(memory, "--token-rate", "10", memory_gib=0.2),
        "slow": fake_model(memory, "--load-delay-s", "60", memory_gib=0.2),
    }


@pytest.fixture(scope="package")
def service() -> Iterator[Gateway]:
    """Up or down, as the test before left it."""
    with gateway(models, start=False) as made:
        yield made


@pytest.fixture
def running(service: Gateway) -> Gateway:
    """It, up."""
    if not supervisors_of(service.layout):
        service.up()
    return service
