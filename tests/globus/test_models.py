"""Cold models of a whole gateway, asked for over the whole chain."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from gateway_plugin.errors import GatewayError
from gateway_plugin.globus import GlobusClient
from tests.globus.conftest import COLD, LOAD_S
from tests.support.gateways import wait_for

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain

pytestmark = [pytest.mark.globus, pytest.mark.timeout(300)]


@pytest.fixture
def client(globus_site: Chain) -> Iterator[GlobusClient]:
    with GlobusClient(globus_site.endpoint_id, globus_site.function_id, timeout_s=120) as made:
        yield made


def test_who_does_not_wait_hears_the_state_and_when_and_has_it_loaded(client: GlobusClient) -> None:
    assert client.model(COLD[0]).state == "cold"

    def said() -> GatewayError | None:
        """What is said while it loads; before, a node may have to come."""
        with pytest.raises(GatewayError) as caught:
            client.chat("hello", COLD[0], wait=False)
        assert caught.value.status == 503
        assert caught.value.state is not None
        return caught.value if caught.value.state == "loading" else None

    error = wait_for(said, 90, "that it loads")
    assert error.eta_s is not None
    assert error.eta_s >= 0
    assert client.wait_until_ready(COLD[0], timeout_s=90).ready
    assert COLD[0] in client.chat("hello", COLD[0], wait=False)


def test_who_waits_is_answered_when_it_is_loaded(client: GlobusClient) -> None:
    assert client.model(COLD[1]).state == "cold"
    began = time.monotonic()
    assert all(COLD[1] in answer for answer in client.map_chat(["a", "b", "c"], COLD[1]))
    assert time.monotonic() - began >= LOAD_S
    assert client.model(COLD[1]).ready
