"""One gateway for the tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gateways import Gateway, fake_model, gateway

WAITING_MAX = 30


@pytest.fixture(scope="package")
def running() -> Iterator[Gateway]:
    """With room for one of ``a`` and ``b``, and for all of the others beside it."""
    with gateway(
        lambda memory: {
            "a": fake_model(memory, "--load-delay-s", "1", aliases=["first"]),
            "b": fake_model(memory, "--load-delay-s", "1"),
            "brief": fake_model(memory, memory_gib=0.1, keep_alive="1s"),
            "slow": fake_model(memory, "--load-delay-s", "12", memory_gib=0.1),
            "vectors": fake_model(memory, "--task", "embed", memory_gib=0.1, task="embed"),
        },
        limits={"waiting_requests": WAITING_MAX, "body_bytes": 200_000},
    ) as made:
        yield made
