"""What docs/security.md promises is held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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
