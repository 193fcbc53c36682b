"""Command lines and environments of engines in their runtimes: one table for all kinds of containers."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.engine_records import ENGINE_MARK
from gateway_plugin.runtimes import Runtime
from gateway_plugin.runtimes.containers import Facts, Start, inner_env, named_paths
from gateway_plugin.runtimes.start import in_runtime
from serve.agent.argv import engine_env, python_of

SECRET = "sk-engine-0123456789"
TOKEN = "hf_abcdefghijklmnop"
WEIGHTS = "/data/hub/models--org--m"
SNAPSHOT = f"{WEIGHTS}/snapshots/abc"
ARGV = (
    *("python3", "-m", "vllm.entrypoints.openai.api_server", "--model", SNAPSHOT),
    *("--ssl-keyfile", "/s/tls/key", "--chat-template=/data/chat.jinja", "--download-dir", "/data/down"),
)
ENV = {
    "PATH": "/gw/bin:/usr/bin",
    "HOME": "/users/u",
    "LD_LIBRARY_PATH": "/host/lib",
    "PYTHONPATH": "/gw",
    "VIRTUAL_ENV": "/gw",
    "CUDA_VISIBLE_DEVICES": "1",
    "HF_HOME": "/data/hub",
    "HF_TOKEN": TOKEN,
    "VLLM_API_KEY": SECRET,
    "MODULEPATH": "/modules",
    "BASH_FUNC_module%%": "() { :; }",
    "APPTAINER_BIND": "/scratch",
}
FACTS = Facts(
    engine="gw-1-e1",
    home="/users/u/.cache/gw/homes/box",
    scratch="/tmp/gw/scratch/e1",
    read=("/s/tls/key", WEIGHTS),
    files=frozenset({"/data/chat.jinja"}),
    folders=frozenset({"/data/down", "/data/hub"}),
    gpu="nvidia",
    user="u",
)


def started(facts: Facts = FACTS, entry: dict[str, Any] | None = None, **runtime: Any) -> Start:
    box = Runtime.model_validate({"name": "box", **runtime})
    fields = {"name": "m", "source": SNAPSHOT, "memory_gib": 1, "gpus": 1, "runtime": box, **(entry or {})}
    model = Model.model_validate(fields)
    env = {**ENV, **model.variables, ENGINE_MARK: "/s/logs/e1.log"}
    return in_runtime(ARGV, env, model.variables, box, facts)


def contained(kind: str, facts: Facts = FACTS, **fields: Any) -> Start:
    return started(facts, container={"kind": kind, "image": "/sw/vllm.sif", "binds": ["/scratch"], **fields})


BINDS = "/tmp/gw/scratch/e1:/tmp /s/tls/key:/s/tls/key{ro} {w}:{w}{ro} /data/chat.jinja:/data/chat.jinja{ro} "
BINDS += "/data/down:/data/down /data/hub:/data/hub /scratch:/scratch"


def binds(option: str, read_only: str) -> str:
    return " ".join(f"{option} {bind}" for bind in BINDS.format(ro=read_only, w=WEIGHTS).split())


INSIDE = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_TOKEN", "VLLM_API_KEY", ENGINE_MARK, "NVIDIA_VISIBLE_DEVICES",
          "NVIDIA_DRIVER_CAPABILITIES")  # fmt: skip
NAMES = " ".join(f"--env {name}" for name in INSIDE)
HOME = FACTS.home
HOMES = f"--env HOME={HOME} --env TMPDIR=/tmp"
COMMANDS = {
    "apptainer": f"apptainer exec --cleanenv --no-mount tmp,cwd --home {HOME} --pwd {HOME} --nv"
    f" {binds('--bind', ':ro')} /sw/vllm.sif",
    "singularity": f"singularity exec --cleanenv --no-mount tmp,cwd --home {HOME} --pwd {HOME} --nv"
    f" {binds('--bind', ':ro')} /sw/vllm.sif",
    "podman": "podman --cgroup-manager=cgroupfs run --rm --replace --name gateway-gw-1-e1 --pull=never --network=host"
    f" --ipc=host --security-opt=label=disable --workdir {HOME} --entrypoint= --volume {HOME}:{HOME}"
    f" --device nvidia.com/gpu=all {binds('--volume', ':ro')} {HOMES} {NAMES} /sw/vllm.sif",
    "podman-hpc": "podman-hpc run --rm --replace --name gateway-gw-1-e1 --pull=never --network=host --ipc=host"
    f" --security-opt=label=disable --workdir {HOME} --entrypoint= --volume {HOME}:{HOME} --gpu"
    f" {binds('--volume', ':ro')} {HOMES} {NAMES} /sw/vllm.sif",
    "enroot": f"enroot start --rc /tmp/gw/scratch/e1/rc --mount {HOME}:{HOME} {binds('--mount', '')} {HOMES} {NAMES}"
    " /sw/vllm.sif",
    "shifter": "shifter --image=/sw/vllm.sif --module=gpu --volume=/scratch:/scratch",
    "charliecloud": f"ch-run --cd {HOME} --unset-env=LD_LIBRARY_PATH --unset-env=LD_PRELOAD"
    " --set-env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    f" --set-env=HOME={HOME} --set-env=TMPDIR=/tmp --bind /tmp/gw/scratch/e1:/tmp --bind {HOME}:{HOME}"
    f" --bind /s/tls/key:/s/tls/key --bind {WEIGHTS}:{WEIGHTS} --bind /data/chat.jinja:/data/chat.jinja"
    " --bind /data/down:/data/down --bind /data/hub:/data/hub --bind /scratch /sw/vllm.sif --",
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_of_each_kind_of_container(kind: str) -> None:
    start = contained(kind)
    assert shlex.join(start.argv) == shlex.join([*shlex.split(COMMANDS[kind]), *ARGV])


@pytest.mark.parametrize("kind", COMMANDS)
def test_secrets_reach_a_container_by_its_environment_only(kind: str) -> None:
    start = contained(kind)
    assert not any(SECRET in word or TOKEN in word for word in start.argv)
    prefix = {"apptainer": "APPTAINERENV_", "singularity": "SINGULARITYENV_"}.get(kind, "")
    assert start.env[f"{prefix}VLLM_API_KEY"] == SECRET
    assert start.env[f"{prefix}CUDA_VISIBLE_DEVICES"] == "1"
    assert start.env[f"{prefix}{ENGINE_MARK}"] == "/s/logs/e1.log"
    assert f"{prefix}PYTHONPATH" not in start.env
    assert "PYTHONPATH" not in " ".join(start.argv)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_secret_that_is_called_as_the_nodes_software_is_stays_out_of_argv(kind: str) -> None:
    own = {"CONDA_TOKEN": "c-secret", "PODMAN_PASSWORD": "p-secret", "LD_LIBRARY_PATH": "/mine"}
    start = started(entry={"env": own}, container={"kind": kind, "image": "/sw/vllm.sif"})
    assert not any("-secret" in word for word in start.argv)
    assert {"c-secret", "p-secret"} <= set(start.env.values())


def test_a_container_of_each_gpu_maker() -> None:
    flags = {
        ("apptainer", "amd"): "--rocm",
        ("podman", "amd"): "--device /dev/kfd --device /dev/dri --group-add keep-groups",
    }
    for (kind, maker), words in flags.items():
        said = " ".join(contained(kind, replace(FACTS, gpu=maker)).argv)  # type: ignore[arg-type]
        assert f" {words} " in said
        assert not any(word in said for word in ("--nv ", "nvidia"))
    for kind in COMMANDS:
        said = " ".join(contained(kind, replace(FACTS, gpu="")).argv)
        assert not any(word in said for word in ("--nv ", "--gpu ", "--module", "nvidia", "--rocm", "--device"))


def test_what_ends_a_container_that_left_the_process_group() -> None:
    assert contained("podman").remove == (
        *("podman", "--cgroup-manager=cgroupfs", "rm", "--force", "--ignore", "--time=0", "gateway-gw-1-e1"),
    )
    assert contained("podman-hpc").remove == (
        *("podman-hpc", "rm", "--force", "--ignore", "--time=0", "gateway-gw-1-e1"),
    )
    assert {contained(kind).remove for kind in COMMANDS if not kind.startswith("podman")} == {()}


def test_arguments_of_a_container_come_last_before_its_image() -> None:
    for kind in COMMANDS:
        argv = contained(kind, args=["--say", "no"]).argv
        at = argv.index("--say")
        follows = ARGV[0] if kind == "shifter" else "/sw/vllm.sif"
        assert argv[at : at + 3] == ("--say", "no", follows)


def test_enroot_gets_a_command_script_that_runs_its_arguments() -> None:
    assert contained("enroot").files == {"/tmp/gw/scratch/e1/rc": 'exec "$@"\n'}


def test_charliecloud_binds_an_empty_folder_of_the_image_above_what_it_lacks() -> None:
    facts = replace(FACTS, in_image=frozenset({"/s/tls/key"}), empty_in_image=frozenset({"/data", "/users"}))
    argv = contained("charliecloud", facts).argv
    assert " --bind /users:/users --bind /s/tls/key:/s/tls/key --bind /data:/data --bind /scratch " in " ".join(argv)
    grown = contained("charliecloud", facts, args=["--write"]).argv
    assert f"{WEIGHTS}:{WEIGHTS}" in grown
    binds = ["/data/mine", "/sw/a", "/sw/b", "/sw/a:/c"]
    mine = contained("charliecloud", replace(facts, empty_in_image=frozenset({"/data", "/sw"})), binds=binds).argv
    assert " --bind /data:/data --bind /sw --bind /sw/a:/c " in " ".join(mine)
    with_variables_of_the_image = contained("charliecloud", replace(facts, image_environment=True)).argv
    assert "--set-env" in with_variables_of_the_image


def test_the_variables_of_an_entry_reach_it_under_any_name() -> None:
    own = {"LD_LIBRARY_PATH": "/cuda", "PYTHONPATH": "/mine"}
    start = started(entry={"env": own}, container={"kind": "apptainer", "image": "/i"}, env={"PYTHONPATH": "/runtime"})
    assert start.env["APPTAINERENV_LD_LIBRARY_PATH"] == "/cuda"
    assert start.env["APPTAINERENV_PYTHONPATH"] == "/mine"
    assert "APPTAINERENV_PATH" not in start.env
    charlie = started(entry={"env": own}, container={"kind": "charliecloud", "image": "/i"})
    assert "--unset-env=LD_LIBRARY_PATH" not in charlie.argv
    assert charlie.env["LD_LIBRARY_PATH"] == "/cuda"


_NODES = """PATH HOME LD_PRELOAD PYTHONHOME CONDA_PREFIX CONDA_SHLVL MODULESHOME LOADEDMODULES LMOD_CMD _LMFILES_
    __LMOD_REF_COUNT_PATH BASH_ENV TMPDIR XDG_RUNTIME_DIR APPTAINER_BIND SINGULARITYENV_X ENROOT_CACHE_PATH"""
_KEPT = """HF_HOME PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS TIKTOKEN_ENCODINGS_BASE NCCL_SOCKET_IFNAME LANG FI_PROVIDER
    XDG_CACHE_HOME TRANSFORMERS_OFFLINE VLLM_CACHE_ROOT PYTHONUNBUFFERED CUDA_MODULE_LOADING CH_IMAGE http_proxy"""


def test_the_nodes_own_software_stays_outside_a_container() -> None:
    names = _NODES.split()
    kept = _KEPT.split()
    assert tuple(inner_env(dict.fromkeys((*names, *kept), "1"), {})) == tuple(kept)


def test_paths_that_arguments_and_variables_name() -> None:
    argv = (
        "/opt/engine",
        "--a",
        "/data/a",
        "--b=/data/b",
        "m=/data/lora",
        "/usr/lib/x",
        "/dev/shm",
        "/data/../etc",
        "-x",
    )
    env = {"CACHE": "/cache", "LIST": "/a:/b", "ROOT": "/", "URL": "https://x/y", "S": "//x"}
    assert named_paths(argv, env) == ("/data/a", "/data/b", "/data/lora", "/cache")


# --- without a container ---


def test_a_python_of_its_own_has_nothing_of_the_gateways() -> None:
    start = started(python="/sw/env/bin/python")
    assert start.argv == ARGV
    assert start.env["PATH"] == "/sw/env/bin:/gw/bin:/usr/bin"
    assert start.env["VIRTUAL_ENV"] == "/sw/env"
    assert "PYTHONPATH" not in start.env
    assert started(entry={"env": {"PYTHONPATH": "/mine"}}, python="/sw/env/bin/python").env["PYTHONPATH"] == "/mine"
    conda = started(replace(FACTS, conda=True), python="/sw/env/bin/python").env
    assert ("VIRTUAL_ENV" not in conda, conda["CONDA_PREFIX"]) == (True, "/sw/env")
    assert start.read == ("/sw/env",)  # bubblewrap must not hide it


def test_modules_are_loaded_by_a_shell_that_becomes_the_engine() -> None:
    start = started(modules=["cuda/12.8", "vllm/0.32"], module_folders=["/soft/modulefiles"])
    assert start.argv[:4] == ("bash", "--noprofile", "--norc", "-c")
    assert start.argv[5:] == ("modules", "1", "2", "/soft/modulefiles", "cuda/12.8", "vllm/0.32", *ARGV)
    assert start.env["MODULEPATH"] == "/modules"
    assert "PYTHONPATH" not in start.env


def test_modules_are_loaded_before_the_container_starts() -> None:
    start = started(modules=["apptainer"], container={"kind": "apptainer", "image": "/i"})
    assert start.argv[0] == "bash"
    assert start.argv[8:11] == ("apptainer", "apptainer", "exec")


def test_the_interpreter_of_each_runtime() -> None:
    def python(**runtime: Any) -> str:
        box = Runtime.model_validate({"name": "box", **runtime})
        return python_of(Model.model_validate({"name": "m", "source": "o/m", "memory_gib": 1, "runtime": box}))

    assert python(modules=["vllm"]) == "python3"
    assert python(container={"kind": "podman", "image": "vllm"}) == "python3"
    assert python(container={"kind": "podman", "image": "vllm"}, python="/opt/py") == "/opt/py"


def test_a_runtimes_variables_yield_to_the_entrys_and_reach_its_engine() -> None:
    box = Runtime.model_validate({"name": "box", "env": {"A": "runtime", "B": "runtime"}})
    fields = {"name": "m", "source": "o/m", "memory_gib": 1, "runtime": box, "env": {"A": "entry"}}
    model = Model.model_validate(fields)
    assert model.variables == {"A": "entry", "B": "runtime"}
    env = engine_env(model, SECRET, (), (), {})
    assert (env["A"], env["B"], env["VLLM_API_KEY"]) == ("entry", "runtime", SECRET)


def test_an_entrys_pythonpath_is_not_the_pythonpath_of_the_containers_program() -> None:
    for kind in ("podman-hpc", "enroot"):
        start = started(entry={"env": {"PYTHONPATH": "/mine"}}, container={"kind": kind, "image": "/i"})
        assert "PYTHONPATH=/mine" in start.argv
        assert "PYTHONPATH" not in start.env
