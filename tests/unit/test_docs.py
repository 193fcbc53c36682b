"""What docs/security.md promises is held by tests that exist; commands that are told can work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

from gateway_plugin.catalog import parse_catalog
from gateway_plugin.edge.process import front_hosts
from gateway_plugin.site import load_site

ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[a-z_/]+\.py)?::(test_\w+)`")


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """Each row of the tables: what is promised, and the tests (file, name) that hold it."""
    found = []
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|") or len(cells) != 2 or cells[0] in ("promise", "---"):
            continue
        file, tests = "", []
        for match in _TEST.finditer(cells[1]):
            file = match[1] or file
            tests.append((file, match[2]))
        found.append((cells[0], tests))
    return found


def test_each_promise_of_the_security_page_names_tests_that_are_there() -> None:
    known: dict[str, set[str]] = {}
    rows = promises()
    assert len(rows) >= 30
    for promise, tests in rows:
        assert tests, f"no test: {promise}"
        for file, name in tests:
            if file not in known:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                known[file] = {
                    node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                }
            assert name in known[file], f"{file} has no {name}: {promise}"


_TUNNEL = re.compile(r"ssh [^'`\n]*?-L (\d+):([^: ]+):(\d+) ([A-Z-]+)")
_ADDRESS = re.compile(r"(https?)://([\w.-]+):(\d+)")


def test_every_tunnel_that_is_told_leads_to_the_default_front_door_and_to_a_name_in_its_certificate() -> None:
    """Through the loopback of the gateway's own machine: there alone it listens unless the site says otherwise."""
    site = load_site("local")
    places = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "gateway_plugin").rglob("*.py")]
    told = 0
    for place in places:
        text = place.read_text(encoding="utf-8")
        for match in _TUNNEL.finditer(text):
            told += 1
            mine, host, port, through = match.groups()
            assert (host, int(port)) == (site.bind, site.port), place
            assert through == "GATEWAY-HOST", f"{place}: to the machine itself, not to one beside it"
            scheme, name, used = _ADDRESS.findall(text[match.end() :])[0]
            assert (scheme, used) == ("https", mine), place
            assert name in front_hosts(site), place
    assert told >= 2


def test_the_catalogs_on_the_page_of_runtimes_are_catalogs() -> None:
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    kinds = set()
    for block in blocks:
        document = yaml.safe_load(block)
        document.setdefault("models", {})
        for runtime in parse_catalog(document, "docs/engines.md").runtimes:
            kinds.add(runtime.container.kind if runtime.container else "")
    assert kinds >= {"", "apptainer", "podman-hpc"}
