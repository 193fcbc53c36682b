"""A node's address, its GPUs, and the notice of the block's script that the node leaves soon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from gateway_plugin.paths import Layout
from serve.core.events import NodeLeaves

NOTICE_EVERY_S = 0.5
"""Interval of the agent's check; the shortest notices of schedulers are some 20 s."""


async def notice_in(folder: Path, node: str, every_s: float = NOTICE_EVERY_S) -> NodeLeaves:
    """The notice that the script writes to ``folder``: ``{"until": seconds since the epoch, "reason"}``.

    Raises:
        ValueError: it is malformed.
    """
    path = folder / "notice"
    while not path.exists():  # noqa: ASYNC110 - written by another process; a check costs microseconds
        await asyncio.sleep(every_s)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return NodeLeaves(node, float(document["until"]), str(document["reason"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a notice: {type(error).__name__}: {error}") from None


def node_address(layout: Layout) -> str:
    """This node's address as the rest of the cluster sees it: given, or Ray's, or that of the route to the head."""
    if given := os.environ.get("GATEWAY_NODE_ADDRESS"):
        return given
    ray = sys.modules.get("ray")  # only where we are an actor: no import of ours
    if ray is not None and ray.is_initialized():
        return str(ray.util.get_node_ip_address())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; only the route is looked up
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


class DevicesUnseen(Exception):
    """``nvidia-smi`` did not report how much memory is in use."""


async def nvidia_smi(*options: str, timeout_s: float) -> str:
    """The values that ``nvidia-smi`` reports, with what it says beside them. Raises ``DevicesUnseen``."""
    argv = ("nvidia-smi", "--format=csv,noheader,nounits", *options)
    try:
        asked = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise DevicesUnseen(f"nvidia-smi: {error}") from None
    try:
        async with asyncio.timeout(timeout_s):
            said = (await asked.communicate())[0].decode(errors="replace")
    except TimeoutError:
        raise DevicesUnseen(f"nvidia-smi said nothing for {timeout_s:g} s") from None
    finally:
        if asked.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                asked.kill()
            await asked.wait()
    if asked.returncode != 0:
        raise DevicesUnseen(f"nvidia-smi: {said[:200].strip()}")
    return said


def gpu_total_mib() -> int:
    """Physical memory of this node's smallest GPU in MiB; 0 if ``nvidia-smi`` reports none."""
    argv = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(int(line) for line in said.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
