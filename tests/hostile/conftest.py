"""One gateway for the tests that kill and block engines only: each test has models of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gateways import Gateway, fake_model, gateway

HANG_S = 4.0
"""``hang_after`` of the engines in ``WEDGED``."""
RATE = 10
"""Tokens a second of ``slow``."""
POISONED = ("beside", "steady", "retries")
"""What is remembered of one model's poisons says nothing about the next one's."""
WEDGED = {"counts": ("--metrics",), "mute": ("--metrics", "--wedge-metrics"), "plain": ()}
"""An engine that counts its work; one whose counters hang with it; one that has none."""


@pytest.fixture(scope="package")
def running() -> Iterator[Gateway]:
    """With room for all of its models: none makes room for another."""
    with gateway(
        lambda memory: {
            **{name: fake_model(memory, "--load-delay-s", "0.5", memory_gib=0.1) for name in POISONED},
            **{
                name: fake_model(
                    memory,
                    "--load-delay-s",
                    "0.3",
                    "--ignore-sigterm",
                    *options,
                    memory_gib=0.2,
                    hang_after=f"{HANG_S}s",
                )
                for name, options in WEDGED.items()
            },
            "slow": fake_model(memory, "--load-delay-s", "3", "--token-rate", str(RATE), memory_gib=0.2),
            "never": fake_model(memory, "--load-delay-s", "3000", memory_gib=0.2),
        }
    ) as made:
        yield made
