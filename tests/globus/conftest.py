"""The chain, once for all tests here, with a fake engine as its gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain
    from tests.support.globus.gateway import EngineAsGateway


@pytest.fixture(scope="package")  # broker and endpoint end before other tests begin
def globus_gateway() -> Iterator[EngineAsGateway]:
    """The gateway that the endpoint asks."""
    from tests.support.globus.gateway import engine_as_gateway

    with engine_as_gateway() as made:
        yield made


@pytest.fixture(scope="package")
def globus_chain(globus_gateway: EngineAsGateway) -> Iterator[Chain]:
    """Broker, stand-in and endpoint, started; and this process led to the stand-in."""
    from tests.support.globus.chain import chain, missing

    if (reason := missing()) is not None:
        pytest.skip(reason)
    with (
        chain(globus_gateway.url, globus_gateway.key, standin=("--trust-agents",)) as made,
        pytest.MonkeyPatch.context() as patch,
    ):
        made.start()
        for name, value in made.service_environment.items():
            patch.setenv(name, value)
        yield made
