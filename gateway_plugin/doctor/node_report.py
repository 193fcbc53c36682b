"""Checks of a node's report (``blocks/self_check.py``). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from gateway_plugin.runtimes.versions import Seen
from gateway_plugin.service.checks import Check, Verdict
from gateway_plugin.site import NodeType

REPORT_BYTES = 65536
"""The maximum length of a report."""

_CLOCK_OFF_S = 5.0


class Report(BaseModel, extra="forbid", frozen=True):
    """A node's report."""

    host: str
    time_s: float
    """Seconds since the epoch."""
    python: str
    packages: dict[str, str]
    """Name -> version, ``missing`` where there is none."""
    head: str
    """``reached``, or why the head's address was not."""
    address: str
    """Its own address, on the way to the head."""
    port: int
    """The port where it accepts connections for a while."""
    cpus: int
    memory_mib: int
    visible_gpus: str
    """``CUDA_VISIBLE_DEVICES``; empty if it is not set."""
    gpu_mib: list[int]
    """The memory of each GPU that ``nvidia-smi`` shows; empty without it."""
    isolation: str
    """``works``: bubblewrap works; or the reason why not."""
    gpus: list[str] = []
    """``NAME, DRIVER`` of each GPU."""
    cuda: str = ""
    """The newest CUDA that the driver knows."""
    runtimes: dict[str, Seen] = {}
    """Of the catalog's runtimes; ``""``: the gateway's own environment."""


def judged(
    node_type: NodeType, report: Report, here: Mapping[str, str], called_back: str, now_s: float
) -> tuple[Check, ...]:
    """The checks of a node's report.

    Args:
        here: versions on this machine: ``python`` and packages.
        called_back: ``reached``, or why the node could not be called from here.
        now_s: when the report was read, in seconds since the epoch.
    """
    return (
        Check(f"{node_type.name}: state folder", Verdict.OK, f"{report.host} sees it"),
        _versions(node_type, report, here),
        _network(node_type, report, called_back),
        _gpus(node_type, report),
        _size(node_type, report),
        _clock(node_type, report, now_s),
        _isolation(node_type, report),
        *_runtimes(node_type, report),
    )


def _versions(node_type: NodeType, report: Report, here: Mapping[str, str]) -> Check:
    name = f"{node_type.name}: versions"
    there = {"python": report.python, **report.packages}
    advice = "make worker_init= of the node type set up the environment that the gateway runs in"
    for package in ("ray", "gateway-plugin", "cryptography"):  # the last for its certificate
        if there.get(package, "missing") == "missing":
            return Check(name, Verdict.FAIL, f"no {package} for python {report.python} on {report.host}", advice)
    for package in ("python", "ray"):  # Ray rejects a node with a different Ray or Python version
        if there[package] != here[package]:
            words = f"{package} {there[package]} on {report.host}, {here[package]} here"
            return Check(name, Verdict.FAIL, words, advice)
    return Check(name, Verdict.OK, ", ".join(f"{package} {version}" for package, version in there.items()))


def _network(node_type: NodeType, report: Report, called_back: str) -> Check:
    name = f"{node_type.name}: network"
    if report.head != "reached":
        advice = "head_interface= or head_address= in the site file: an address of this machine that nodes reach"
        return Check(name, Verdict.FAIL, f"{report.host} does not reach the head: {report.head}", advice)
    if called_back != "reached":
        words = f"{report.host} ({report.address}) cannot be called from here: {called_back}"
        return Check(name, Verdict.FAIL, words, "engines must be reachable: ask the site which machine may do that")
    return Check(name, Verdict.OK, f"{report.host} ({report.address}) reaches the head, and is reached")


def _gpus(node_type: NodeType, report: Report) -> Check:
    name = f"{node_type.name}: GPUs"
    given = [device for device in report.visible_gpus.split(",") if device]
    count = len(given) or len(report.gpu_mib)
    if count < node_type.gpus:
        words = f"{count} on {report.host}, {node_type.gpus} expected"
        return Check(name, Verdict.FAIL, words, "gpus= of the node type, or what its provider asks for")
    if not node_type.gpus:
        return Check(name, Verdict.OK, "none asked for")
    if not report.gpu_mib:
        return Check(name, Verdict.WARN, f"{count}; no nvidia-smi on {report.host}: their memory was not seen")
    least_gib = min(report.gpu_mib) / 1024
    if least_gib < node_type.gpu_memory_gib:
        words = f"{least_gib:.1f} GiB each on {report.host}, and engines may use {node_type.gpu_memory_gib:.1f}"
        return Check(name, Verdict.FAIL, words, "lower gpu_memory_gib= of the node type")
    words = f"{count} with {least_gib:.1f} GiB, engines may use {node_type.gpu_memory_gib:.1f}"
    kinds = "; ".join(sorted(set(report.gpus)))
    return Check(name, Verdict.OK, f"{words}; {kinds}, CUDA {report.cuda or 'unknown'}" if kinds else words)


def _size(node_type: NodeType, report: Report) -> Check:
    name = f"{node_type.name}: size"
    memory_gib = report.memory_mib / 1024
    words = f"{report.cpus} cores and {memory_gib:.0f} GiB for the job on {report.host}"
    if node_type.engine_memory_gib > memory_gib:
        advice = f"lower engine_memory_gib= of the node type ({node_type.engine_memory_gib:.0f})"
        return Check(name, Verdict.FAIL, words, advice)
    if node_type.cpus > report.cpus:
        return Check(name, Verdict.WARN, words, f"cpus= of the node type is {node_type.cpus}")
    return Check(name, Verdict.OK, words)


def _clock(node_type: NodeType, report: Report, now_s: float) -> Check:
    name, off_s = f"{node_type.name}: clock", report.time_s - now_s
    if abs(off_s) > _CLOCK_OFF_S:
        words = f"{report.host} is {abs(off_s):.0f} s {'ahead' if off_s > 0 else 'behind'}"
        return Check(name, Verdict.WARN, words, "certificates and walltimes depend on the clock: report it to the site")
    return Check(name, Verdict.OK, f"{report.host} has the same time")


def _isolation(node_type: NodeType, report: Report) -> Check:
    name = f"{node_type.name}: engine isolation"
    if report.isolation != "works":
        words = f"engines on {report.host} would read what you read: {report.isolation}"
        return Check(name, Verdict.WARN, words, "ask the site for bubblewrap and user namespaces on its nodes")
    return Check(name, Verdict.OK, f"bubblewrap works on {report.host}")


def _runtimes(node_type: NodeType, report: Report) -> Iterator[Check]:
    for runtime, seen in report.runtimes.items():
        name = f"{node_type.name}: runtime {runtime}" if runtime else f"{node_type.name}: engines without a runtime"
        words = ", ".join(f"{what} {version}" for what, version in seen.versions.items())
        if seen.problem:
            advice = (
                f"correct '{runtime}' in the catalog" if runtime else "give its entries a runtime, or install it there"
            )
            yield Check(name, Verdict.FAIL, f"{seen.problem} (on {report.host})", advice)
        elif _newer(seen.versions.get("torch for cuda", ""), report.cuda):
            words += f"; the driver of {report.host} knows CUDA up to {report.cuda}"
            yield Check(name, Verdict.WARN, words, "take a build for an older CUDA, or an image with its libraries")
        else:
            yield Check(name, Verdict.OK, words)


def _newer(built_for: str, known: str) -> bool:
    """Whether a build needs a newer driver: within a major version an older driver will do (docs.nvidia.com, "CUDA
    Compatibility": minor version compatibility)."""
    majors = [text.partition(".")[0] for text in (built_for, known)]
    return all(text.isdigit() for text in majors) and int(majors[0]) > int(majors[1])
