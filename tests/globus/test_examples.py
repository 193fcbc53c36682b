"""The examples that reach a site through Globus Compute, each run as a reader runs it, on a whole gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.globus.conftest import WRITER
from tests.support.gateways import ROOT

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain

pytestmark = [pytest.mark.globus, pytest.mark.timeout(300)]


def run(globus_site: Chain, *argv: str, folder: Path) -> str:
    """What it printed; stderr goes to the test's own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GATEWAY_ENDPOINT": globus_site.endpoint_id,
        "GATEWAY_FUNCTION": globus_site.function_id,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-u", *argv], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
            timeout=180, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"not within {late.timeout:.0f} s; until then it printed: {late.stdout!r}")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_program(globus_site: Chain, tmp_path: Path) -> None:
    said = run(globus_site, str(ROOT / "examples/globus_client.py"), folder=tmp_path)
    assert "8 prompts in 1 task" in said
    assert "3 vectors of 8 numbers" in said


def test_a_workflow(globus_site: Chain, tmp_path: Path) -> None:
    said = run(globus_site, str(ROOT / "examples/globus_parsl.py"), folder=tmp_path)
    assert said.count(f"  {WRITER} pid=") == said.count("most like the answer to: ") == 3


def test_a_notebook_cell_after_cell(globus_site: Chain, tmp_path: Path) -> None:
    """As Jupyter shows it: the value of a cell's last line."""
    source = (ROOT / "examples/globus_notebook.py").read_text(encoding="utf-8")
    shown = tmp_path / "cells.py"
    shown.write_text(
        "import ast, sys\n"
        f"for cell in {[cell for cell in source.split('# %%') if not cell.startswith(' [markdown]')]!r}:\n"
        "    tree = ast.parse(cell)\n"
        "    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None\n"
        "    exec(compile(tree, 'cell', 'exec'))\n"
        "    if last: print(eval(compile(ast.Expression(last.value), 'cell', 'eval')))\n"
    )
    said = run(globus_site, str(shown), folder=tmp_path)
    assert f"('{WRITER}', 'generate', " in said
    assert said.count(f"{WRITER} pid=") == 1 + 6 + 6
    assert "(3, 8)" in said


def test_a_batch_goes_on_where_it_stopped(globus_site: Chain, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps({"id": n, "prompt": f"hello @tokens={n}"}) + "\n" for n in range(1, 21)))
    cut = json.dumps({"id": 1, "answer": "of before"}) + "\n" + '{"id": 2, "ans'  # a crash in the middle of a line
    target.write_text(cut)
    run(globus_site, str(ROOT / "examples/globus_batch.py"), str(source), str(target), folder=tmp_path)
    complete = [line for line in target.read_text().splitlines() if line.endswith("}")]
    answers = {entry["id"]: entry["answer"] for entry in map(json.loads, complete)}
    assert answers.keys() == set(range(1, 21))
    assert answers.pop(1) == "of before"
    assert all(answer.count(" w") == number - 1 for number, answer in answers.items())
