"""What the block's script tells its agent: that the node is to leave soon. A small file on the node's own disk."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from serve.core.events import NodeLeaves

NOTICE_EVERY_S = 0.5
"""How often an agent looks; the shortest notices there are last some 20 s."""


async def notice_in(folder: Path, node: str, every_s: float = NOTICE_EVERY_S) -> NodeLeaves:
    """The notice that the script puts into ``folder`` one day: ``{"until": seconds since the epoch, "reason"}``.

    Raises:
        ValueError: it cannot be understood.
    """
    path = folder / "notice"
    while not path.exists():  # noqa: ASYNC110 - written by another process; a look costs microseconds
        await asyncio.sleep(every_s)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return NodeLeaves(node, float(document["until"]), str(document["reason"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a notice: {type(error).__name__}: {error}") from None
