"""Hugging Face's ``transformers serve`` (transformers 5, cli/serve.py): plain HTTP, no key, one name."""

from __future__ import annotations

import re
from pathlib import Path

from gateway_plugin.weights import is_local
from serve.agent.engines import named
from serve.agent.engines.start import Start

_PROGRAM = Path(named.__file__).read_text(encoding="utf-8")


def argv(start: Start) -> tuple[str, ...]:
    """The command line. It loads ``org/name@REVISION`` as it is; in a folder's name ``@`` and ``:`` are special."""
    model = start.model
    local = is_local(start.source)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", model.name) if local else start.source
    return (
        *(start.python, "-c", _PROGRAM, start.bind.socket, name, start.source if local else "-"),
        *("transformers.cli.transformers", "serve", name),
        *("--device", "auto" if model.gpus else "cpu"),
        *model.args,
    )
