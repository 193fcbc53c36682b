"""From an engine's command line and environment to those that start it in its runtime: pure.

Modules are loaded by bash, which becomes the container's program, which starts the engine.

Sources: lmod.readthedocs.io and modules.readthedocs.io, for where the ``module`` function is defined and its exit code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from gateway_plugin.runtimes import Runtime
from gateway_plugin.runtimes.containers import GATEWAYS_PYTHON, Facts, Start, in_container

_MODULES = r"""
for init in "${LMOD_PKG:-/}/init/bash" "${MODULESHOME:-/}/init/bash" /etc/profile.d/{z00_,}lmod.sh \
    /etc/profile.d/{00-,z00-,zz-,}modules.sh /usr/share/{lmod/lmod,Modules,modules}/init/bash; do
    [ "$(type -t module)" != function ] || break
    [ ! -r "$init" ] || . "$init" >&2
done
[ "$(type -t module)" = function ] || { echo "ERROR: this node has no 'module' function (Lmod or Tcl)" >&2; exit 69; }
folders=$1 count=$2; shift 2
while [ "$folders" -gt 0 ]; do module use "$1" || exit 1; shift; folders=$((folders - 1)); done
said=$(mktemp) || exit 1
while [ "$count" -gt 0 ]; do
    module load "$1" 2>"$said"; code=$?
    cat "$said" >&2
    # Version 3 of Environment Modules ends with 0 all the same.
    if [ "$code" -ne 0 ] || grep -q 'ERROR:[0-9]' "$said"; then
        rm -f "$said"; echo "ERROR: 'module load $1' failed" >&2; exit 1
    fi
    shift; count=$((count - 1))
done
rm -f "$said"
exec "$@"
"""
"""Arguments: the number of folders, the number of modules, these, and the command line."""


def in_runtime(
    argv: tuple[str, ...], env: Mapping[str, str], own: Mapping[str, str], runtime: Runtime, facts: Facts
) -> Start:
    """The command line and environment that start ``argv`` in ``runtime``.

    Args:
        env: the whole environment, ``own`` included.
        own: the variables of the entry and of its runtime.
    """
    if runtime.container is not None:
        start = in_container(argv, env, own, runtime.container, facts)
    else:
        start = Start(argv, _with_python(env, runtime, own, facts.conda), read=_prefix(runtime), written=facts.written)
    if not runtime.modules:
        return start
    counts = (str(len(runtime.module_folders)), str(len(runtime.modules)))
    loading = ("bash", "--noprofile", "--norc", "-c", _MODULES, "modules", *counts)
    return replace(start, argv=(*loading, *runtime.module_folders, *runtime.modules, *start.argv))


def _prefix(runtime: Runtime) -> tuple[str, ...]:
    return (str(PurePosixPath(runtime.python).parent.parent),) if runtime.python else ()


def _with_python(env: Mapping[str, str], runtime: Runtime, own: Mapping[str, str], conda: bool) -> dict[str, str]:
    """The environment of another Python: its programs first, nothing of the gateway's own Python."""
    kept = {name: value for name, value in env.items() if name in own or not GATEWAYS_PYTHON.fullmatch(name)}
    if runtime.python:
        folder = PurePosixPath(runtime.python).parent
        kept["PATH"] = f"{folder}:{env['PATH']}" if env.get("PATH") else str(folder)
        kept.setdefault("CONDA_PREFIX" if conda else "VIRTUAL_ENV", str(folder.parent))
    return kept
