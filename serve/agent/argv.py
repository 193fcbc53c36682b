"""The command line and environment of an engine process: pure. A key is never in the command line.

A catalog entry with ``engine: command`` gives an argv template. In each of its arguments these are replaced:

    {host} {port}                      where to listen
    {socket}                           the Unix socket to listen on, instead of {port}
    {name}, {model}                    the model's name in the catalog
    {names}                            name and aliases (without adapters): the argument is repeated, once for each
    {adapters}                         NAME=PATH of each adapter, repeated like that
    {source} {revision}                where the weights are: a folder, or a hub name and its revision (may be empty)
    {keyfile} {certfile} {cafile}      TLS: private key, certificate, and the authority of the clients it accepts
    {python}                           the Python interpreter of its runtime, else the gateway's

A program that is given ``{certfile}`` or ``{keyfile}`` must serve TLS, demand a client certificate signed by
``{cafile}`` and take its key from ``VLLM_API_KEY``. Any other is behind a doorman (``serve.agent.doorman``). Both
answer ``GET /health`` (``Model.health``) with 200 once they are loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping

from gateway_plugin.catalog import Model
from gateway_plugin.hub import TOKENS
from gateway_plugin.masking import speaks_of_a_secret
from gateway_plugin.weights import is_local
from serve.agent.engines import llama_cpp, sglang, template, transformers_serve, vllm, whisper
from serve.agent.engines.start import Bind, Start, TlsFiles

__all__ = ["Bind", "TlsFiles", "engine_argv", "engine_env"]

_ARGV: Mapping[str, Callable[[Start], tuple[str, ...]]] = {
    "vllm": vllm.argv,
    "sglang": sglang.argv,
    "llama.cpp": llama_cpp.argv,
    "transformers": transformers_serve.argv,
    "whisper": whisper.argv,
    "command": template.argv,
}

_ENGINES_OWN = ("HF_", "HUGGING_FACE_", "MODELSCOPE_", "VLLM_", "TORCH", "TRITON_", "NCCL_", "NVIDIA_", "GLOO_", "UCX_")
"""Prefixes of variables of libraries that engines load: always passed on; tokens for weights are among them."""
_PROXIES = frozenset({"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"})
"""Proxy variables may contain a password, and do not work without it."""
_OURS = ("GATEWAY_", "RAY_", "RAYLET_", "PARSL_", "SLURM", "SBATCH_", "SRUN_", "PBS_", "PMI", "PALS_")
"""Variables of the gateway, and the batch system's description of a job and its ranks: not for engines."""
_SESSION = ("SSH_", "GPG_", "KRB5", "DBUS_", "XAUTHORITY")
"""Give access to a user's agents and tickets."""
_SHELLS_OWN = frozenset({"PWD", "OLDPWD", "SHLVL", "_"})
_VISIBLE = re.compile(r"(?!NVIDIA_)\w*_VISIBLE_(DEVICES|CORES|CHIPS|MODULES)|ONEAPI_DEVICE_SELECTOR")
"""Device selection: the gateway chooses, and Ray empties these for the agent."""
_KEPT = "GATEWAY_KEPT_"
"""Prefix of variables that Ray sets for its workers; the suffix is the name in the block (``blocks/host.py``)."""
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")

_PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""For torch's allocator of pinned host memory (docs.pytorch.org/docs/stable/notes/cuda.html): 8 threads touch the
pages, then CUDA registers them. CUDA's own allocation takes one thread, and an engine's first sleep waits for it."""
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""That memory in pages of 2 MiB where the kernel gives them on request (``transparent_hugepage/enabled``: ``madvise``,
its default): fewer to touch and register. A glibc before 2.35 ignores it."""


def python_of(model: Model) -> str:
    """The interpreter of ``model``'s engine: its runtime's, else in a container or behind modules ``python3``, else the
    agent's own."""
    return sys.executable if model.runtime is None else model.runtime.interpreter(sys.executable)


def engine_argv(
    model: Model, source: str, bind: Bind, tls: TlsFiles, gpu_total_mib: int = 0, sleeps: bool = False
) -> tuple[str, ...]:
    """The command line of ``model``'s engine.

    Args:
        source: the weights, resolved: a folder or a hub name.
        gpu_total_mib: physical memory of one GPU; 0 if unknown or none. vLLM takes its share as a fraction of it.
        sleeps: the engine can be put to sleep (``sleeping.py``): a vLLM with GPUs. Pass it to ``engine_env`` too.
    """
    start = Start(model, source, bind, tls, python_of(model), gpu_total_mib, sleeps)
    return _ARGV[model.engine](start)


def engine_env(
    model: Model,
    key: str,
    gpus: tuple[int, ...],
    visible: tuple[str, ...],
    environ: Mapping[str, str],
    sleeps: bool = False,
) -> dict[str, str]:
    """The whole environment of ``model``'s engine.

    Args:
        key: the key that the engine demands of callers; one behind a doorman gets none, and is asked without one.
        gpus: indices of its GPUs on this node.
        visible: the node's own names of its GPUs (``visible_devices``); ``()``: by their indices.
        environ: the agent's own environment, of which ``passed_on`` reaches the engine.
        sleeps: the engine can be put to sleep: vLLM serves ``/sleep`` only with its other development endpoints. They
            need no key; the client certificate guards them, and the edge, which has one, forwards no such path. It
            gets ``_PINNING`` and ``_HUGE_PAGES`` too, unless the catalog or the block sets these variables.
    """
    env = passed_on(environ)
    env["VLLM_NO_USAGE_STATS"] = "1"
    # vLLM closes idle connections after 5 s; the edge would find some of its pool dead and pause before it tries again.
    env.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    # Where the catalog allows media from a host, a redirect of that host must not lead to another.
    env.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    env["PYTHONUNBUFFERED"] = "1"  # its last output must reach the log
    env["CUDA_VISIBLE_DEVICES"] = ",".join(device_names(gpus, visible))
    # The batch system and nvidia-smi number GPUs by bus; CUDA's own order is the fastest first.
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if is_local(model.source):
        env["HF_HUB_OFFLINE"] = "1"
    if model.engine == "vllm" and not model.gpus:
        # The worker runs inside the engine core: one import of torch and 500 MB less, 23 s instead of 50 to start.
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if model.adapters is not None:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # its paths take the key, and the edge does not pass them on
    env.update(model.variables)
    if is_local(model.source) and env["HF_HUB_OFFLINE"].lower() in ("1", "on", "yes", "true"):
        for name in TOKENS:  # it asks the hub for nothing
            env.pop(name, None)
    if sleeps and model.gpus:
        env["VLLM_SERVER_DEV_MODE"] = "1"
        if "PYTORCH_CUDA_ALLOC_CONF" not in env:  # the older name of the same
            env.setdefault("PYTORCH_ALLOC_CONF", _PINNING)
        env.setdefault("GLIBC_TUNABLES", _HUGE_PAGES)
    if not model.behind_doorman:
        env["VLLM_API_KEY"] = key
    return env


def device_names(gpus: tuple[int, ...], visible: tuple[str, ...]) -> tuple[str, ...]:
    """The node's own names of these GPUs."""
    return tuple(visible[gpu] if gpu < len(visible) else str(gpu) for gpu in gpus)


def sleeps_in(env: Mapping[str, str]) -> bool:
    """Whether a vLLM with this environment starts with sleep mode: it does not with PyTorch's expandable segments."""
    allocator = env.get("PYTORCH_CUDA_ALLOC_CONF", "") + env.get("PYTORCH_ALLOC_CONF", "")
    return "expandable_segments:true" not in allocator.lower()


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of a block's environment that its engines receive: all but (1) variables of the gateway and the job,
    (2) those that shell, batch system and Ray set for themselves, (3) secrets that are not for engines, by name or by a
    password in an address.
    """
    found = {**environ, **{name.removeprefix(_KEPT): was for name, was in environ.items() if name.startswith(_KEPT)}}
    return {
        name: value
        for name, value in found.items()
        if not name.startswith(_OURS)  # (1)
        and name not in _SHELLS_OWN
        and not _VISIBLE.fullmatch(name)  # (2)
        and not (_KEPT + name in environ and not value)
        and (name.startswith(_ENGINES_OWN) or name in _PROXIES or not _is_secret(name, value))  # (3)
    }


def _is_secret(name: str, value: str) -> bool:
    by_name = name.startswith(_SESSION) or speaks_of_a_secret(name)
    return by_name or _PASSWORD_IN_URL.search(value) is not None


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The batch system's names of this block's GPUs: ``("2", "3")``, or UUIDs; ``()`` if it sets none.

    ``GATEWAY_VISIBLE_DEVICES`` first: Ray empties ``CUDA_VISIBLE_DEVICES`` for an actor that asks for no GPU.
    """
    named = environ.get("GATEWAY_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES") or ""
    return tuple(part.strip() for part in named.split(",") if part.strip())
