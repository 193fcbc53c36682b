"""One gateway for the tests here, whose own folder everybody may enter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateways import Gateway, fake_model, gateway

CATALOG_SECRET = "hf-secret-of-the-catalog"


@pytest.fixture(scope="package")
def shared() -> Iterator[Gateway]:
    """Not up yet: ``tests/support/lanes.py`` has those first that want it up, then those that bring it down."""

    def models(memory: Path) -> dict[str, Any]:
        entry = fake_model(memory)
        entry["env"] = {**entry["env"], "HF_TOKEN": CATALOG_SECRET}
        return {"alpha": entry}

    with gateway(models, start=False) as made:
        made.folder.chmod(0o755)  # what lies above does not hide what the gateway's own folders must
        yield made
