"""The import rules of docs/design.md ("Files"), read from the sources; and how little it takes to import the client."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OURS = ("gateway_plugin", "parsl_configs", "serve")
IMPURE = {
    "aiohttp", "asyncio", "concurrent", "datetime", "http", "httpx", "io", "logging", "multiprocessing", "os",
    "pathlib", "psutil", "random", "ray", "requests", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "ssl", "starlette", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
"""What a decision may not know of: the clock, the machine, the network, other processes, chance."""
IMPURE_BUILTINS = {"open", "print", "input", "exec", "eval", "compile", "__import__"}
SHELLS = ("serve.ingress", "serve.controller", "serve.agent")
WALL_CLOCK = {
    "gateway_plugin.clock": "converts it",
    "gateway_plugin.processes": "processes in records of earlier versions",
    "gateway_plugin.blocks.host": "against Slurm's times, and for people",
    "gateway_plugin.blocks.pool": "what the ledger keeps",
    "gateway_plugin.blocks.stop_files": "for people",
    "gateway_plugin.schedulers.queue": "against the ledger's times",
    "gateway_plugin.sizing.kept": "how old what was looked up is",
    "gateway_plugin.globus.endpoint.endpoints": "against a file's",
    "gateway_plugin.globus.function": "against files'",
    "gateway_plugin.globus.client.channel": "numbers that rise",
    "gateway_plugin.edge.keys": "when a key was made, for people",
    "gateway_plugin.service.certificate": "what a certificate says",
    "gateway_plugin.service.teardown": "what the ledger keeps",
    "gateway_plugin.blocks.self_check": "compared with this machine's by doctor",
    "gateway_plugin.doctor.node_probe": "against a node's",
    "gateway_plugin.cli.weights": "against files' times",
    "gateway_plugin.cli.usage": "against the usage log's times",
    "gateway_plugin.tls": "what a certificate says",
    "serve.agent.engine": "told to the controller, which converts it",
    "serve.ingress.boarding": "against the controller's deaths of engines",
    "serve.ingress.inference": "against the edge's stamp on the request",
}
"""Who may read the clock that people set, and what for. Whatever waits, or tells how long something took, may not."""
LINES_MAX = 350
LONG = {
    "gateway_plugin.globus.function": "its text is registered whole",
    "serve.core.events": "a vocabulary",
    "serve.core.state": "a vocabulary",
}
"""Modules that are longer, and why they are one."""
LIGHT = (
    "gateway_plugin", "gateway_plugin.client", "gateway_plugin.apps", "gateway_plugin.api_types",
    "gateway_plugin.connection",
    "gateway_plugin.errors", "gateway_plugin.catalog", "gateway_plugin.paths", "gateway_plugin.globus",
    "gateway_plugin.globus.client.client", "gateway_plugin.asyncio_client", "gateway_plugin.compute",
)  # fmt: skip


CORE_LAYERS = (
    "beside events habits policy spread table",
    "callers",
    "effects frozen state",
    "transaction",
    "room engine_use looking node_times shares reasons",
    "supply slots sleep_room asking learned",
    "forecast transitions",
    "plan",
    "crowds",
    "handlers policies views",
    "step",
    "replay weighing",
)
"""Modules of ``serve.core``, the lowest first: each imports lower ones only, those of a folder never each other."""
PARTS_OF_THE_CORE = (".handlers", ".policies", ".views")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of ``package`` (dotted): its name and its syntax tree."""
    place = ROOT.joinpath(*package.split("."))
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for path in files:
        yield module_name(path), parsed(path)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(tree: ast.Module) -> tuple[tuple[str, int], ...]:
    """Every module that is imported, wherever in the file: ``from a import b`` counts as ``a`` and as ``a.b``."""
    return tuple(_imports(tree))


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def breaches(package: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of our own modules that are not under ``allowed``."""
    found = []
    for name, tree in sources(package):
        for module, line in imports(tree):
            # "from a.b import thing": a.b.thing is a name, unless there is such a module
            if not within(module, OURS) or not exists(module):
                continue
            if not within(module, allowed) and not any(rule.startswith(module + ".") for rule in allowed):
                found.append(f"{name}:{line} imports {module}")
    return found


@cache
def exists(module: str) -> bool:
    place = ROOT.joinpath(*module.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_long_modules_are_few_and_have_a_reason() -> None:
    lines = {name: len(text_of(name).splitlines()) for package in OURS for name, _ in sources(package)}
    assert {name for name, count in lines.items() if count > LINES_MAX} == set(LONG)


def text_of(module: str) -> str:
    place = ROOT.joinpath(*module.split("."))
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return path.read_text(encoding="utf-8")


def test_there_are_sources_to_judge() -> None:
    names = {name for package in OURS for name, _ in sources(package)}
    assert {"serve.core.state", "gateway_plugin.client", "serve.controller.deployment", "serve.ingress.http"} <= names


def test_the_core_imports_only_itself_and_shared_vocabularies() -> None:
    shared = tuple(f"gateway_plugin.{name}" for name in ("catalog", "errors", "option_values", "phases"))
    assert breaches("serve.core", ("serve.core", *shared)) == []


def test_the_simulator_knows_the_core_and_no_shell_and_no_part_of_the_service_knows_the_simulator() -> None:
    shared = ("gateway_plugin.catalog", "gateway_plugin.errors")
    assert breaches("serve.simulate", ("serve.simulate", "serve.core", *shared)) == []
    found = [
        f"{name}:{line} imports {module}"
        for package in ("gateway_plugin", "serve")
        for name, tree in sources(package)
        for module, line in imports(tree)
        if within(module, ("serve.simulate",)) and not within(name, ("serve.simulate",))
    ]
    assert found == []


def test_the_core_has_layers_and_no_import_runs_up_or_sideways() -> None:
    level = {f"serve.core.{part}": rank for rank, parts in enumerate(CORE_LAYERS) for part in parts.split()}

    def layer(module: str) -> int | None:
        return level.get(module, level.get(module.rpartition(".")[0]))

    found = []
    for name, tree in sources("serve.core"):
        rank = layer(name)
        if name == "serve.core" or name.endswith(PARTS_OF_THE_CORE):
            continue
        if rank is None:
            found.append(f"{name} is in no layer")
            continue
        for module, line in imports(tree):
            other = layer(module) if exists(module) else None
            if other is not None and other >= rank:
                found.append(f"{name}:{line} imports {module}")
    assert found == []


def test_the_core_is_pure() -> None:
    found = []
    for name, tree in sources("serve.core"):
        found += [f"{name}:{line} imports {m}" for m, line in imports(tree) if m.split(".")[0] in IMPURE]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
                found.append(f"{name}:{node.lineno} calls {node.func.id}()")
            if isinstance(node, ast.Global | ast.Nonlocal | ast.AsyncFunctionDef | ast.Await):
                found.append(f"{name}:{node.lineno} {type(node).__name__}")
    assert found == []


def test_the_wall_clock_is_read_only_where_it_is_meant() -> None:
    readers = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", ".create_time")
    found = {
        name
        for package in OURS
        for name, tree in sources(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(readers)
    }
    assert found == set(WALL_CLOCK)


def test_the_cores_values_are_frozen() -> None:
    found = []
    for name, tree in sources("serve.core"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for decorator in node.decorator_list:
                text = ast.unparse(decorator)
                if text.split("(")[0].endswith("dataclass") and "frozen=True" not in text:
                    found.append(f"{name}:{node.lineno} {node.name} is not frozen")
    assert found == []


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shells_never_import_each_other(shell: str) -> None:
    others = tuple(other for other in SHELLS if other != shell)
    found = [
        f"{name}:{line} imports {module}"
        for name, tree in sources(shell)
        for module, line in imports(tree)
        if within(module, (*others, "serve.app"))
    ]
    assert found == []


def test_of_the_edge_only_the_controller_knows_and_only_its_run_time() -> None:
    for shell in SHELLS:
        edge = [
            f"{name}:{line} imports {module}"
            for name, tree in sources(shell)
            for module, line in imports(tree)
            if within(module, ("gateway_plugin.edge",)) and exists(module)
        ]
        if shell == "serve.controller":
            edge = [line for line in edge if not line.endswith(("gateway_plugin.edge", "gateway_plugin.edge.runtime"))]
        assert edge == []


def test_the_shells_know_nothing_of_service_blocks_and_cli() -> None:
    forbidden = tuple(f"gateway_plugin.{part}" for part in ("service", "blocks", "cli", "client", "apps"))
    # The pool is in another process: the controller reads its ledger, and leaves it requests.
    files_of_the_pool = ("gateway_plugin.blocks", "gateway_plugin.blocks.ledger", "gateway_plugin.blocks.stop_files")
    found = [
        f"{name}:{line} imports {module}"
        for shell in SHELLS
        for name, tree in sources(shell)
        for module, line in imports(tree)
        if within(module, forbidden) and exists(module)
        if not (shell == "serve.controller" and module in files_of_the_pool)
    ]
    assert found == []


def test_the_plugin_imports_nothing_of_serve() -> None:
    assert breaches("gateway_plugin", ("gateway_plugin", "parsl_configs")) == []


def test_site_files_are_values_of_parsl_and_the_plugin() -> None:
    found = []
    for name, tree in sources("parsl_configs"):
        for module, line in imports(tree):
            top = module.split(".")[0]
            if top == "gateway_plugin":
                allowed = module == top or not exists(module) or within(module, ("gateway_plugin.site",))
            else:
                allowed = top in {"__future__", "parsl"} or top in sys.stdlib_module_names
            if not allowed:
                found.append(f"{name}:{line} imports {module}")
    assert found == []


def test_nobody_takes_rays_serve_for_ours() -> None:
    found = []
    for package in (*OURS, "tests", "examples"):
        for name, tree in sources(package):
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module == "ray":
                    found += [
                        f"{name}:{node.lineno}" for a in node.names if a.name == "serve" and a.asname != "ray_serve"
                    ]
    assert found == []


@pytest.mark.process
@pytest.mark.parametrize("module", LIGHT)
def test_the_client_side_imports_without_the_heavy_packages(module: str) -> None:
    blocked = ("ray", "vllm", "torch", "parsl", "transformers", "numpy", "starlette", "cryptography", "psutil")
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name) + " (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
import {module}
assert not set({blocked!r}) & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


def test_nothing_names_the_machine_it_was_written_on() -> None:
    # a path of somebody's home or checkout in a source file works for nobody else
    found = []
    for package in (*OURS, "tests", "examples"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == Path(__file__):
                continue
            found += [
                f"{path}" for word in ("/home/", "/work/main", "/root/") if word in path.read_text(encoding="utf-8")
            ]
    assert found == []


def test_no_module_of_the_plugin_imports_in_a_circle() -> None:
    # imports inside functions count, too: they only postpone it
    graph: dict[str, set[str]] = {}
    for name, tree in sources("gateway_plugin"):
        ours = {module for module, _ in imports(tree) if within(module, ("gateway_plugin",)) and exists(module)}
        graph[name] = {m for m in ours if ROOT.joinpath(*m.split(".")).with_suffix(".py").is_file()}
    while ready := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in ready}
    assert {name: sorted(needs & graph.keys()) for name, needs in graph.items()} == {}


@pytest.mark.process
def test_a_blocks_script_starts_without_what_takes_long_to_import() -> None:
    """Until it has its signal handlers, a SIGTERM of the scheduler ends it, and nothing cleans up after it."""
    code = (
        "import sys; sys.modules['pydantic'] = sys.modules['ray'] = sys.modules['parsl'] = None\n"
        "import gateway_plugin.blocks.host\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
