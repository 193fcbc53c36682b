"""The engine's command line and environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.weights import needs_source
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env, sleeps_in, visible_devices

TLS = TlsFiles(Path("/t/engine.key"), Path("/t/engine.crt"), Path("/t/ca.pem"))
BIND = Bind("10.0.0.7", 40123)


def model(**fields: Any) -> Model:
    return Model.model_validate({"name": "m", "source": "/weights/m", "memory_gib": 40, **fields})


def value(argv: tuple[str, ...], option: str) -> str:
    """What counts: the last of its kind."""
    return argv[len(argv) - argv[::-1].index(option)]


def test_vllm_serves_tls_and_demands_a_certificate() -> None:
    argv = engine_argv(model(), "/weights/m", BIND, TLS)
    assert argv[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    options = {"--ssl-keyfile": "/t/engine.key", "--ssl-certfile": "/t/engine.crt", "--ssl-ca-certs": "/t/ca.pem"}
    assert {option: value(argv, option) for option in options} == options
    assert value(argv, "--ssl-cert-reqs") == "2"
    assert (value(argv, "--host"), value(argv, "--port")) == ("10.0.0.7", "40123")


def test_every_name_is_served() -> None:
    argv = engine_argv(model(aliases=("a", "org/b")), "/weights/m", BIND, TLS)
    at = argv.index("--served-model-name")
    assert argv[at + 1 : at + 4] == ("m", "a", "org/b")


def test_without_a_gpu_float32_and_a_bounded_cache() -> None:
    argv = engine_argv(model(), "/weights/m", BIND, TLS)
    assert value(argv, "--dtype") == "float32"
    assert "--enforce-eager" in argv
    assert value(argv, "--kv-cache-memory-bytes") == str(2**30)
    assert "--tensor-parallel-size" not in argv


def test_on_gpus_it_takes_its_share_of_each_and_no_more() -> None:
    argv = engine_argv(model(gpus=4), "/weights/m", BIND, TLS, gpu_total_mib=81920)
    assert value(argv, "--tensor-parallel-size") == "4"
    assert value(argv, "--gpu-memory-utilization") == "0.500"
    assert "--dtype" not in argv
    whole = engine_argv(model(gpus=1, memory_gib=80), "/weights/m", BIND, TLS, gpu_total_mib=81920)
    assert value(whole, "--gpu-memory-utilization") == "0.950"
    assert "--gpu-memory-utilization" not in engine_argv(model(gpus=1), "/weights/m", BIND, TLS)


def test_the_catalogs_arguments_come_last() -> None:
    argv = engine_argv(model(args=("--dtype", "bfloat16")), "/weights/m", BIND, TLS)
    assert argv[-2:] == ("--dtype", "bfloat16")
    assert value(argv, "--dtype") == "bfloat16"


def test_a_hub_model_is_loaded_at_its_revision() -> None:
    argv = engine_argv(model(source="org/m@0f3c"), "org/m@0f3c", BIND, TLS)
    options = {"--model": "org/m", "--revision": "0f3c", "--tokenizer-revision": "0f3c"}
    assert {option: value(argv, option) for option in options} == options
    assert "--revision" not in engine_argv(model(), "org/m", BIND, TLS)
    assert value(engine_argv(model(), "/weights/m@2", BIND, TLS), "--model") == "/weights/m@2"
    entry = model(engine="command", command=("run", "{source}", "--rev={revision}"))
    assert engine_argv(entry, "org/m@0f3c", BIND, TLS) == ("run", "org/m", "--rev=0f3c")


def test_no_url_is_fetched_for_callers_unless_the_catalog_says_so() -> None:
    assert value(engine_argv(model(), "/weights/m", BIND, TLS), "--allowed-media-domains").endswith(".invalid")
    opened = engine_argv(model(args=("--allowed-media-domains", "images.example.org")), "/weights/m", BIND, TLS)
    assert value(opened, "--allowed-media-domains") == "images.example.org"
    assert engine_env(model(), "k", (), (), {})["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    followed = model(env={"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1"})
    assert engine_env(followed, "k", (), (), {})["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "1"


def test_a_template_is_filled_in() -> None:
    command = (
        "{python}",
        "-m",
        "x",
        "--at={host}:{port}",
        "--as={names}",
        "{source}",
        "{keyfile},{certfile}",
        "{cafile}",
    )
    entry = model(engine="command", command=command, aliases=("a",), args=("-v",))
    argv = engine_argv(entry, "org/w", BIND, TLS)
    assert argv == (
        *(sys.executable, "-m", "x", "--at=10.0.0.7:40123", "--as=m", "--as=a", "org/w"),
        *("/t/engine.key,/t/engine.crt", "/t/ca.pem", "-v"),
    )


def test_adapters_are_asked_for_by_their_own_names() -> None:
    """vLLM ends with an error where an adapter has the name of its base."""
    lora = ("--enable-lora", "--lora-modules", "b=/p/b", "--max-lora-rank", "16")
    words = engine_argv(model(name="base", aliases=("a", "b"), args=lora), "org/m", BIND, TLS)
    at = words.index("--served-model-name")
    assert words[at + 1 : at + 4] == ("base", "a", "--host")
    assert words[-5:] == lora
    template = model(name="base", aliases=("a", "b"), engine="command", command=("run", "{names}", *lora))
    assert engine_argv(template, "org/m", BIND, TLS)[:3] == ("run", "base", "a")


def test_a_templates_other_braces_stay() -> None:
    entry = model(engine="command", command=("run", '{"rope": {"factor": 2}}', "{unknown}"))
    assert engine_argv(entry, "", BIND, TLS)[1:] == ('{"rope": {"factor": 2}}', "{unknown}")


def test_weights_are_looked_for_only_where_they_are_spoken_of() -> None:
    assert needs_source(model())
    assert needs_source(model(engine="command", command=("run", "--w={source}")))
    assert not needs_source(model(engine="command", command=("run", "{name}")))


SECRETS = {
    "RAY_AUTH_TOKEN": "t",
    "GATEWAY_ADMIN_KEY": "s",
    "AWS_SECRET_ACCESS_KEY": "s",
    "OPENAI_API_KEY": "s",
    "GITHUB_TOKEN": "s",
    "MYSQL_PASSWORD": "s",
    "SSHPASS": "s",
    "GOOGLE_APPLICATION_CREDENTIALS": "/g/google.json",
    "SSH_AUTH_SOCK": "/tmp/agent",
    "KRB5CCNAME": "/tmp/krb5cc_1",
    "SLURM_JWT": "s",
    "DATABASE_URL": "postgres://me:word@db/x",
    "PIP_INDEX_URL": "https://me:word@packages.example.org/simple",
}
USUAL = (
    "PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS TIKTOKEN_ENCODINGS_BASE TIKTOKEN_RS_CACHE_DIR SAFETENSORS_FAST_GPU "
    "HF_HOME FLASHINFER_WORKSPACE_BASE HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_CACHE TRANSFORMERS_OFFLINE "
    "LD_PRELOAD VLLM_DISABLE_COMPILE_CACHE NCCL_SOCKET_IFNAME APPTAINER_BIND SINGULARITY_BIND CUDA_DEVICE_ORDER "
    "FI_PROVIDER MIOPEN_USER_DB_PATH MODELSCOPE_CACHE PATH HOME LD_LIBRARY_PATH TOKENIZERS_PARALLELISM "
    "NVIDIA_VISIBLE_DEVICES"
)


def test_the_environment_has_the_key_and_no_secret_of_anybody() -> None:
    env = engine_env(model(), "the-key", (), (), {**SECRETS, "VLLM_API_KEY": "other", "PATH": "/bin"})
    assert env["VLLM_API_KEY"] == "the-key"
    assert env["PATH"] == "/bin"
    assert not env.keys() & SECRETS.keys()


def test_what_a_block_exports_reaches_its_engines() -> None:
    environ = {name: f"of {name}" for name in USUAL.split()}
    env = engine_env(model(source="org/name"), "k", (), (), environ)
    assert {name: value for name, value in env.items() if name in environ} == environ
    proxy = {"https_proxy": "http://me:word@proxy:3128"}
    assert engine_env(model(), "k", (), (), proxy)["https_proxy"] == proxy["https_proxy"]


def test_what_the_job_the_shell_and_ray_set_for_themselves_does_not() -> None:
    others = (
        "SLURM_PROCID",
        "SLURMD_NODENAME",
        "PBS_JOBID",
        "PMI_RANK",
        "PMIX_RANK",
        "PARSL_CORES",
        "PWD",
        "RAY_JOB_ID",
    )
    devices = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR", "TPU_VISIBLE_CHIPS")
    env = engine_env(model(), "k", (), (), dict.fromkeys((*others, *devices), "1"))
    assert not env.keys() & {*others, *devices}


def test_what_ray_changed_for_its_worker_is_as_the_block_had_it() -> None:
    changed = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": ""}
    unset = {"GATEWAY_KEPT_OMP_NUM_THREADS": "", "GATEWAY_KEPT_LD_PRELOAD": ""}
    assert not engine_env(model(), "k", (), (), {**changed, **unset}).keys() & changed.keys()
    said = {"GATEWAY_KEPT_OMP_NUM_THREADS": "8", "GATEWAY_KEPT_LD_PRELOAD": "/lib/x.so"}
    env = engine_env(model(), "k", (), (), {**changed, **said})
    assert (env["OMP_NUM_THREADS"], env["LD_PRELOAD"]) == ("8", "/lib/x.so")
    assert not env.keys() & said.keys()


def test_the_key_is_not_the_catalogs_to_set() -> None:
    assert engine_env(model(env={"VLLM_API_KEY": "mine"}), "the-key", (), (), {})["VLLM_API_KEY"] == "the-key"


def test_the_catalogs_environment_wins_over_defaults() -> None:
    env = engine_env(model(env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "0"}), "k", (), (), {})
    assert (env["VLLM_ENABLE_V1_MULTIPROCESSING"], env["HF_HUB_OFFLINE"]) == ("1", "0")


def test_only_its_own_gpus_are_visible_under_the_batch_systems_names() -> None:
    four = model(gpus=2)
    assert engine_env(four, "k", (1, 3), (), {})["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert engine_env(four, "k", (0, 1), ("GPU-a", "GPU-b"), {})["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert engine_env(model(), "k", (), ("2", "3"), {})["CUDA_VISIBLE_DEVICES"] == ""


def test_cuda_numbers_gpus_as_nvidia_smi_does_unless_somebody_said_otherwise() -> None:
    assert engine_env(model(gpus=1), "k", (0,), ("2",), {})["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    theirs = engine_env(model(gpus=1), "k", (0,), ("2",), {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert theirs["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_the_blocks_own_word_on_its_gpus_comes_first() -> None:
    assert visible_devices({"GATEWAY_VISIBLE_DEVICES": "2, 3", "CUDA_VISIBLE_DEVICES": ""}) == ("2", "3")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "5"}) == ("5",)
    assert visible_devices({}) == ()


def test_a_hub_is_asked_only_for_what_is_not_here() -> None:
    assert "HF_HUB_OFFLINE" not in engine_env(model(source="org/name"), "k", (), (), {})
    for local in ("/weights/m", "~/m", "prepared:smollm2-135m-instruct"):
        assert engine_env(model(source=local), "k", (), (), {})["HF_HUB_OFFLINE"] == "1"


def test_the_hubs_token_reaches_only_engines_that_ask_the_hub() -> None:
    environ = {"HF_TOKEN": "hf_1", "HUGGING_FACE_HUB_TOKEN": "hf_2"}
    own = {"HF_TOKEN": "hf_3"}
    assert engine_env(model(source="org/name"), "k", (), (), environ)["HF_TOKEN"] == "hf_1"
    for entry in (model(source="/weights/m"), model(source="/weights/m", env=own)):
        assert not engine_env(entry, "k", (), (), environ).keys() & environ.keys()
    asks = model(source="/weights/m", env={**own, "HF_HUB_OFFLINE": "0"})
    assert engine_env(asks, "k", (), (), environ)["HF_TOKEN"] == "hf_3"


def test_only_a_vllm_with_gpus_that_is_to_sleep_is_given_sleep_mode_and_its_endpoints() -> None:
    for gpus, sleeps in ((1, True), (1, False), (0, True)):
        argv = engine_argv(model(gpus=gpus), "/weights/m", BIND, TLS, sleeps=sleeps)
        env = engine_env(model(gpus=gpus), "key", tuple(range(gpus)), (), {}, sleeps=sleeps)
        able = bool(gpus and sleeps)
        assert ("--enable-sleep-mode" in argv, env.get("VLLM_SERVER_DEV_MODE")) == (able, "1" if able else None)
        assert ("--no-log-error-stack" in argv) == able, "those endpoints turn tracebacks on"


@pytest.mark.parametrize("allocator", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_one_that_is_to_sleep_pins_memory_fast_unless_somebody_said_otherwise(allocator: str) -> None:
    def env(named: dict[str, str] | None = None, sleeps: bool = True, gpus: int = 1) -> dict[str, str]:
        return engine_env(model(gpus=gpus, env=named or {}), "key", tuple(range(gpus)), (), {}, sleeps=sleeps)

    ours = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GLIBC_TUNABLES"}
    assert env().keys() & ours == {"PYTORCH_ALLOC_CONF", "GLIBC_TUNABLES"}
    assert "pinned_use_cuda_host_register:True" in env()["PYTORCH_ALLOC_CONF"]
    assert not (env(sleeps=False).keys() | env(gpus=0).keys()) & ours
    theirs = env({allocator: "max_split_size_mb:20", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert {name: theirs[name] for name in theirs.keys() & ours} == {
        allocator: "max_split_size_mb:20",
        "GLIBC_TUNABLES": "glibc.malloc.arena_max=2",
    }
    block = {allocator: "max_split_size_mb:20"}
    assert engine_env(model(gpus=1), "key", (0,), (), block, sleeps=True).keys() & ours == {allocator, "GLIBC_TUNABLES"}


def test_expandable_segments_and_sleep_do_not_go_together() -> None:
    assert sleeps_in({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"})
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert not sleeps_in({name: "max_split_size_mb:128,expandable_segments:True"})
