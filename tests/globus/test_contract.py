"""The client's contract with a whole gateway: over HTTP, and over the whole chain of Globus Compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from gateway_plugin import Client
from tests.contract.client_stories import ClientStories

if TYPE_CHECKING:
    from tests.support.gateways import Gateway
    from tests.support.globus.chain import Chain

pytestmark = [pytest.mark.globus, pytest.mark.timeout(300)]


class TestOverHttp(ClientStories):
    @pytest.fixture
    def client(self, site_gateway: Gateway) -> Iterator[Client]:
        with Client(state=site_gateway.layout.state) as made:
            yield made


class TestThroughGlobusCompute(ClientStories):
    resumes = True

    @pytest.fixture
    def client(self, globus_site: Chain) -> Iterator[Client]:
        with Client(endpoint=globus_site.endpoint_id, function=globus_site.function_id, timeout_s=120) as made:
            yield made
