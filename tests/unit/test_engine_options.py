"""What an entry of the catalog may tell its engine."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.engine_options import refusal, spelled, words_of


def said(*args: str, gpus: int = 0, **more: Any) -> str | None:
    given = {"engine": "vllm", "source": "org/m", "command": (), "env": {}, **more}
    found = refusal(args=args, gpus=gpus, **given)
    return None if found is None else ": ".join(found)


@pytest.mark.parametrize(
    "option",
    ["--port", "--port=8000", "--host", "--por", "--uds", "--api-key", "--api_key", "--api", "--ssl-keyfile",
     "--ssl_certfile=x", "--ssl-ca-certs", "--ssl-cert-reqs=0", "--ssl-later", "--enable-ssl-refresh"],
)  # fmt: skip
def test_what_the_gateway_gives_itself_is_refused_in_every_spelling(option: str) -> None:
    assert said("--dtype", "auto", option, "x") == (
        f"args: {option.partition('=')[0]}: the gateway gives this itself; leave it out"
    )


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--served-model-name", "say it by the entry's own name and aliases:"),
        ("--served_model_name=x", "say it by the entry's own name and aliases:"),
        ("--served", "say it by the entry's own name and aliases:"),
        ("--model", "say source:"),
        ("--revision", "say source: org/name@REVISION"),
        ("--gpu-memory-utilization", "say memory_gib:"),
        ("--device_memory_utilization=0.9", "say memory_gib:"),
        ("--pipeline-parallel-size", "GPUs of one node"),
        ("-pp", "GPUs of one node"),
        ("-dp=2", "GPUs of one node"),
        ("--data-parallel-size-local", "GPUs of one node"),
        ("--nnodes", "GPUs of one node"),
        ("-n2", "GPUs of one node"),
        ("-r1", "GPUs of one node"),
        ("--device-ids", "GPUs of one node"),
        ("--headless", "HTTP"),
        ("--grpc", "HTTP"),
        ("--config", "put its options into args:"),
        ("--hf-token", "env: {HF_TOKEN: ...}"),
    ],
)
def test_what_has_a_key_of_its_own_is_refused_with_that_key(option: str, instead: str) -> None:
    found = said(option, "2")
    assert found is not None
    assert found.startswith(f"args: {option.partition('=')[0]}: ")
    assert instead in found


@pytest.mark.parametrize("words", [("--tensor-parallel-size", "4"), ("-tp", "4"), ("--tensor-p=4",), ("-t", "4")])
def test_how_many_gpus_is_said_by_gpus(words: tuple[str, ...]) -> None:
    option = words[0].partition("=")[0]
    assert said(*words) == f"args: {option}: say gpus: 4"
    assert said(*words, gpus=4) == f"args: {option}: 'gpus: 4' says it; leave it out"


def test_all_of_them_are_named_at_once() -> None:
    found = said("--port", "8000", "--trust-remote-code", "--host", "::", "--model", "org/m")
    assert found == "args: --port, --host: the gateway gives this itself; leave it out; --model: say source:"


def test_rays_backend_is_refused_and_others_are_not() -> None:
    backend = "--distributed-executor-backend"
    assert backend in str(said(backend, "ray"))
    assert backend in str(said(f"{backend}=ray"))
    assert said(backend, "mp", gpus=2) is None


@pytest.mark.parametrize(
    "args",
    [
        ("--max-model-len", "-1", "--enforce-eager", "--config-format", "hf", "--tokenizer-revision", "abc"),
        ("--limit-mm-per-prompt", '{"image": 4}', "--limit-mm-per-prompt.video", "0", "--mm-encoder-tp-mode", "data"),
        ("-O3", "-q", "awq", "-cc", '{"mode": 3}', "-ep", "-dcp", "2", "-asc", "1"),
        ("--allowed-media-domains", "images.example.org", "--hf-overrides={'a': 'b c'}", "--model-impl", "vllm"),
        ("--override-generation-config", '{"port": 1, "note": "--port x"}'),
    ],
)
def test_the_rest_is_vllms(args: tuple[str, ...]) -> None:
    assert said(*args) is None


def test_a_command_line_copied_whole_is_told_where_options_begin() -> None:
    assert said("vllm", "serve", "org/m", "--dtype", "auto") == (
        "args: 'vllm' is no option; expected the options that come after 'vllm serve MODEL'"
    )
    assert "no option" in str(said("--dtype", "auto", "--", "org/m"))


def test_several_words_in_one_are_refused_and_shown_apart() -> None:
    expected = "'--max-model-len 8192': one word each; expected [--dtype, auto, --max-model-len, '8192']"
    assert said("--dtype", "auto", "--max-model-len 8192") == f"args: {expected}"
    assert said(engine="command", command=("run", "--port {port}")) is not None
    assert said("-", engine="command", command=("sh", "-c", "exec run --port {port}")) is None
    assert said("--chat-template", "{{ a b }}", '--x={"a": "b c"}') is None


def test_a_program_of_the_catalogs_own_has_options_of_its_own() -> None:
    assert said("--tensor-parallel-size", "4", engine="command", command=("vllm", "serve", "--port", "{port}")) is None


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "A=B", "1A", ""])
def test_variables_that_are_the_gateways_or_none_at_all(name: str) -> None:
    assert str(said(env={name: "x"})).startswith("env: ")


def test_nothing_is_filled_in_as_a_shell_would() -> None:
    assert str(said("--chat-template", "${HOME}/x.jinja")).startswith("args: '${HOME}/x.jinja': no shell")
    assert str(said(env={"HF_HOME": "$SCRATCH/hf"})).startswith("env.HF_HOME: '$SCRATCH/hf': no shell")
    assert said(env={"HF_TOKEN": "pa$$word$x", "A": "cost: $5"}) is None
    assert said(engine="command", command=("sh", "-c", "exec ${HOME}/run --port {port}")) is None


def test_a_nul_is_no_text() -> None:
    assert "NUL" in str(said("--x", "a\0b"))
    assert "NUL" in str(said(engine="command", command=("a\0b",)))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("--max-model-len 4096 --chat-template 'a b'", ["--max-model-len", "4096", "--chat-template", "a b"]),
        ("--it's", ["--it's"]),
        ({"--max-model-len": 4096, "--enforce-eager": True, "--off": False, "--x": None},
         ["--max-model-len", "4096", "--enforce-eager", "--x"]),
        (["--enforce-eager", True, {"--seed": 1}, "--limit-mm-per-prompt", {"image": 4}, "--a b"],
         ["--enforce-eager", "--seed", "1", "--limit-mm-per-prompt", '{"image": 4}', "--a", "b"]),
        (None, []),
        (3, ["3"]),
    ],
)  # fmt: skip
def test_what_is_no_list_of_words_is_shown_as_one(written: object, words: list[str]) -> None:
    assert spelled(written) == words
    if not isinstance(written, list):
        with pytest.raises(ValueError, match="expected a list of words"):
            words_of(written)


def test_a_flag_with_a_truth_value_is_told_to_stand_alone() -> None:
    with pytest.raises(ValueError, match=r"got true; .*: \[--enforce-eager\]"):
        words_of(["--enforce-eager", True])
