"""An endpoint from its first ``configure`` over an upgrade and restarts to ``delete``, each step by its effect."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gateway_plugin.processes import Mark, alive, arguments, mark
from tests.globus.test_endpoint import pack, refused, statuses
from tests.support.terminal import Terminal

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain
    from tests.support.globus.gateway import EngineAsGateway

pytestmark = [pytest.mark.globus, pytest.mark.timeout(420)]

NAME = "second"


def running(chain: Chain) -> Mark:
    """Its process; it is online."""
    found = mark(json.loads(chain.cli("status", NAME, "--json").stdout)["pid"])
    assert found is not None
    return found


@contextmanager
def another_version(chain: Chain) -> Iterator[None]:
    """The package as a later version has it: its function's text is another."""
    path = chain.folder / "src/gateway_plugin/globus/function.py"
    before = path.read_text()
    path.write_text(re.sub(r'^FUNCTION_VERSION = ".*"$', 'FUNCTION_VERSION = "99.0.0"', before, flags=re.MULTILINE))
    try:
        yield
    finally:
        path.write_text(before)


def test_from_configure_to_delete(globus_chain: Chain, globus_gateway: EngineAsGateway) -> None:
    from tests.support.globus.chain import beside

    began = time.monotonic()
    with beside(globus_chain, NAME, globus_gateway.url, globus_gateway.key, own_venv=True) as first:
        print(f"configured, with an environment of its own, and online after {time.monotonic() - began:.0f} s")
        assert statuses(first.call(pack("hello"))) == [200]
        process = running(first)
        assert str(first.state / "endpoints/venv") in " ".join(arguments(process.pid))

        # an upgrade: no option is said again, and the clients of before are served on
        with another_version(first):
            said = first.cli("configure", NAME)
            assert f"gateway endpoint restart {NAME}" in said.stdout
            later = replace(first, configured=json.loads(first.cli("configure", NAME, "--json").stdout))
        assert later.endpoint_id == first.endpoint_id
        assert later.function_id != first.function_id
        assert [function["version"] for function in later.configured["functions"]][-1] == "99.0.0"
        assert running(first) == process, "what runs is left alone"
        first.cli("restart", NAME)
        assert not alive(process)
        process = running(first)
        assert statuses(first.call(pack("by the old function"), within_s=90)) == [200]
        assert statuses(later.call(pack("by the new one"), within_s=90)) == [200]

        with another_version(first):
            first.cli("configure", NAME, "--newest-only")
        first.cli("restart", NAME)
        assert statuses(later.call(pack("again"), within_s=90)) == [200]
        with refused("not permitted"):
            first.call(pack("by the old function"), within_s=90)

        process = running(first)
        first.cli("delete", NAME, "--yes")
        assert not alive(process)
        assert first.endpoint_id not in first.cli("list").stdout
        assert not (first.state / "endpoints/globus" / NAME).exists()
        with refused("ENDPOINT_NOT_FOUND"):
            later.call(pack("nobody is there"))


def test_a_person_logs_in(globus_chain: Chain) -> None:
    """Through the flow of Globus's own SDK: a page to visit, a code to type."""
    from tests.support.globus.standin import CODE

    argv, environment, more = globus_chain.command("status")
    for name in ("GLOBUS_COMPUTE_CLIENT_ID", "GLOBUS_COMPUTE_CLIENT_SECRET"):
        del environment[name]
    terminal = Terminal(argv, environment, **more)
    try:
        terminal.read_until("Enter the resulting Authorization Code here: ")
        assert "/v2/oauth2/authorize?" in terminal.shown
        terminal.type(f"{CODE}\n")
        terminal.read_until(f"{globus_chain.endpoint_id}: online")
        assert terminal.end() == 0
    finally:
        terminal.close()
    again = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False, **more)
    assert again.returncode == 0, "it is logged in from now on"
    assert "online" in again.stdout
