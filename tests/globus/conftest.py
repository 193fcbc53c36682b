"""The chain, once for all tests here: with a fake engine as its gateway, and with a whole gateway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gateways import fake_model, gateway

if TYPE_CHECKING:
    from tests.support.gateways import Gateway
    from tests.support.globus.chain import Chain
    from tests.support.globus.gateway import EngineAsGateway

WRITER, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"
"""As the examples name them."""
COLD = ("slow-to-load", "as-slow-to-load")
"""Nobody asks for these but the tests of cold models, each once."""
LOAD_S = 6.0


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


def _models(memory: Path) -> Mapping[str, Any]:
    small = {"memory_gib": 0.3}
    slow = {name: fake_model(memory, "--load-delay-s", str(LOAD_S), **small) for name in COLD}
    embedder = fake_model(memory, "--task", "embed", task="embed", **small)
    return {WRITER: fake_model(memory, **small), EMBEDDER: embedder, **slow}


@pytest.fixture(scope="package")
def site_gateway(globus_chain: Chain) -> Iterator[Gateway]:
    """A whole gateway with room for all of its models."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # the gateway is another site's: nothing leads it to the stand-in
            for name in globus_chain.service_environment:
                patch.delenv(name)
            made = stack.enter_context(gateway(_models))
        yield made


@pytest.fixture(scope="package")
def globus_site(globus_chain: Chain, site_gateway: Gateway) -> Iterator[Chain]:
    """Another endpoint beside that of ``globus_chain``, for ``site_gateway``."""
    from tests.support.globus.chain import beside

    with beside(globus_chain, "models", site_gateway.url, site_gateway.key, ca=site_gateway.layout.ca) as made:
        yield made
