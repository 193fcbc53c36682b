"""Docstrings and comments keep to the field's words: a deny-list, read from the sources (docs/design.md, "Words")."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("serve", "gateway_plugin")

DENIED = re.compile(
    r"\b(nobody|somebody|whoever|wish(?:es|ed)?|forg[ia]v\w*|lately|be\s+had|had\s+not|so\s+long|promis\w*|told"
    r"|whatever|words|mend\w*)\b",
    re.IGNORECASE,
)
LITERAL = re.compile(r"``[^`]*``")
FUNCTION = "gateway_plugin/globus/function.py"
FILES_TO_DO = {
    FUNCTION: "its text is registered at Globus Compute: change it with the next version of the function",
}
"""Path prefix -> why its files are exempt. Entries may only be removed: one without a denied term fails the test."""


def texts(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of each docstring and comment; a docstring is any string that is a statement of its own.

    Comments on consecutive lines are one text, so that a term across two lines is found.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield last - len(block) + 1, "\n".join(block)
                block = []
            last = token.start[0]
            block.append(token.string.lstrip("# "))
    if block:
        yield last - len(block) + 1, "\n".join(block)


def denied(source: str) -> list[str]:
    """``LINE: TERM`` of each denied term in the docstrings and comments of ``source``; code in backticks is exempt."""
    found = [
        (line + text.count("\n", 0, match.start()), " ".join(match.group().split()))
        for line, text in texts(source)
        for match in DENIED.finditer(LITERAL.sub(lambda code: re.sub(r"\S", "`", code.group()), text))
    ]
    return [f"{line}: {term}" for line, term in sorted(found)]


@pytest.fixture(scope="module")
def terms() -> dict[str, list[str]]:
    """Source file, relative to the repository -> its denied terms; files without any are left out."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) > 100  # the packages were found
    found = {path.relative_to(ROOT).as_posix(): denied(path.read_text(encoding="utf-8")) for path in paths}
    return {name: lines for name, lines in found.items() if lines}


def test_docstrings_and_comments_have_no_denied_term(terms: dict[str, list[str]]) -> None:
    assert {name: lines for name, lines in terms.items() if not name.startswith(tuple(FILES_TO_DO))} == {}


def test_an_exemption_is_removed_once_its_files_are_clean(terms: dict[str, list[str]]) -> None:
    assert [prefix for prefix in FILES_TO_DO if not any(name.startswith(prefix) for name in terms)] == []


def test_terms_are_found_in_docstrings_and_comments_only() -> None:
    source = '''"""Somebody waits."""
TOLD_S = 4.0
"""For so
long, ``told`` or not."""
words = "nobody"  # Whatever it is
# that had
# not ended
'''
    assert denied(source) == ["1: Somebody", "3: so long", "5: Whatever", "6: had not"]
