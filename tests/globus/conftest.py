"""The chain, once for all tests here, with a fake engine as its gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain


@pytest.fixture(scope="session")
def globus_chain() -> Iterator[Chain]:
    """Broker, stand-in and endpoint, started; and this process led to the stand-in."""
    from tests.support.globus.chain import chain, missing
    from tests.support.globus.gateway import engine_as_gateway

    if (reason := missing()) is not None:
        pytest.skip(reason)
    with engine_as_gateway() as gateway, chain(gateway.url, gateway.key) as made:
        made.start()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in made.service_environment.items():
                patch.setenv(name, value)
            yield made
