"""What is new and what is kept when the gateway starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin.catalog import Catalog
from gateway_plugin.paths import Layout
from gateway_plugin.service.deployment import Deployment, provision, record_of
from gateway_plugin.site import load_site
from tests.support.clusters import write_local_site

pytestmark = pytest.mark.process


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """HAProxy takes a socket's path of 97 characters at most."""
    with tempfile.TemporaryDirectory(prefix="gwt", dir="/tmp") as folder:
        yield Path(folder)


def test_a_fresh_start_has_another_token_and_authority_of_ray_and_an_adoption_has_not(
    tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_RUN_ROOT", str(short_folder))
    layout = Layout(tmp_path / "state")
    reference = str(write_local_site(tmp_path / "site.py"))
    site = load_site(reference)
    record = record_of(site, reference, tmp_path / "models.yaml", "127.0.0.1")

    def secrets_after(keep: bool) -> tuple[bytes, ...]:
        provision(Deployment(layout, site, record), Catalog(models=()), keep=keep)
        return layout.ray_token.read_bytes(), layout.ray_ca.read_bytes(), layout.ray_ca_key.read_bytes()

    first = secrets_after(keep=False)
    assert secrets_after(keep=True) == first
    assert all(new != old for new, old in zip(secrets_after(keep=False), first, strict=True))
