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
    r"\b(nobody|somebody|whoever|wish(es|ed)?|forgiv\w*|forgave|lately|be had|so long|promis\w*|told|had not"
    r"|whatever|words|mend\w*)\b",
    re.IGNORECASE,
)
FILES_TO_DO: dict[str, str] = {}
"""Path prefix of files that are not yet rewritten: what is left there. It may only shrink: a clean entry fails."""


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring and comment; a docstring is any string that is a statement by itself.

    A comment over several lines is one text, so that a term broken over two lines is found.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    first, last, comment = 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("# ")
        if line == last + 1:
            last, comment = line, f"{comment} {text}"
            continue
        if comment:
            yield first, comment
        first, last, comment = line, line, text
    if comment:
        yield first, comment


def denied(source: str) -> list[str]:
    """``LINE: TERM`` of each denied term in docstrings and comments of ``source``, in the order of lines."""
    found = [
        (line + text.count("\n", 0, match.start()), " ".join(match.group().split()))
        for line, text in texts(source)
        for match in DENIED.finditer(text)
    ]
    return [f"{line}: {term}" for line, term in sorted(found)]


def files() -> dict[str, list[str]]:
    """Each source file of the packages, relative to the repository, with its denied terms."""
    return {
        path.relative_to(ROOT).as_posix(): denied(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
