"""What an entry of the catalog may tell its engine."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.engine_options import adapters, refusal


def said(*args: str, **more: Any) -> str | None:
    found = refusal(Model.model_construct(**{"name": "m", "source": "org/m", "args": args, **more}))
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
    assert "one word each; expected [--dtype, auto, --seed]" in str(said("--dtype", "auto", " --seed"))
    assert said(engine="command", command=("run", "--port {port}")) is not None
    assert said("-", engine="command", command=("sh", "-c", "exec run --port {port}")) is None
    assert said("--chat-template", "{{ a b }}", '--x={"a": "b c"}') is None


def test_a_program_of_the_catalogs_own_has_options_of_its_own() -> None:
    assert said("--tensor-parallel-size", "4", engine="command", command=("vllm", "serve", "--port", "{port}")) is None


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "A=B", "1A", ""])
def test_variables_that_are_the_gateways_or_none_at_all(name: str) -> None:
    assert str(said(env={name: "x"})).startswith("env: ")


@pytest.mark.parametrize("word", ["|", "&&", "&", ";", "2>&1", ">log", "&>", ">>", "<"])
def test_what_only_a_shell_understands_is_refused(word: str) -> None:
    assert f"'{word}': no shell reads these words" in str(said("--dtype", "auto", word, "x"))
    assert "no shell reads" in str(said(engine="command", command=("run", "{port}", word)))


@pytest.mark.parametrize(
    "word", ["\u2013dtype", "\u2014dtype=auto", "\u2212O3", "\u201cauto\u201d", "{a: \u2018b\u2019"]
)
def test_dashes_and_quotes_of_a_web_page_are_refused(word: str) -> None:
    assert "as a keyboard has them" in str(said("--seed", "1", word))


def test_texts_of_models_are_no_shells() -> None:
    assert said("--x", "<think>", "--y", "<|im_end|>", "--z", "a > b", "--w", "{{ '\u2013' }}") is None


@pytest.mark.parametrize(
    "text",
    ["${HOME}/x.jinja", "$HOME/x", "a=$HOME/x", "a=${SCRATCH}/x", "$(hostname)", "`pwd`/x", "~/x", "a=~/x",
     "/scratch/$USER/hf", "--download-dir=~/x", "/opt/lib:$LD_LIBRARY_PATH", "~/bin:/bin", "$SCRATCH"],
)  # fmt: skip
def test_nothing_is_filled_in_as_a_shell_would(text: str) -> None:
    assert str(said("--chat-template", text)).startswith(f"args: {text!r}: no shell")
    assert str(said(env={"A": text})).startswith(f"env.A: {text!r}: no shell")
    assert f"command: {text!r}: no shell" in str(said(engine="command", command=("run", text, "{port}")))
    script = f"exec run {text} --port {{port}}"
    assert said(engine="command", command=("bash", "-lc", script)) is None


def test_what_is_for_no_shell_passes() -> None:
    assert said(env={"HF_TOKEN": "pa$$word$x", "A": "cost: $5", "B": "a~b", "C": "x=1,y=$"}) is None
    assert said("--url", "https://host/~user/x", "--chat-template", "use `code` here", "--x", '{"$ref": "~"}') is None
    assert said(source="~/models/m") is None
    assert "no shell" in str(said(source="~/$X/m"))


def test_adapters_have_names_that_reach_them() -> None:
    lora = ("--enable-lora", "--lora-modules", "a=/p/a", '{"name": "b", "path": "/p/b"}', "--max-lora-rank", "16")
    assert adapters(lora) == ("a", "b")
    assert adapters(("--lora_modules=c=/p", "d=/p")) == ("c", "d")
    assert adapters(("--lora-modules", "--x", "e=/p")) == ()
    assert said(*lora, aliases=("b", "a", "other")) is None
    assert said(*lora, aliases=("other", "b")) == (
        "aliases: the adapter a of --lora-modules is not among them; expected [other, b, a]"
    )
    assert "'m' is the base's name" in str(said("--lora-modules", "m=/p"))
    assert "of two, vLLM takes the later" in str(said(*lora, "--lora-modules", "c=/p", aliases=("a", "b", "c")))
    assert said("--lora-modules", "{", "[]", "7", aliases=()) is None, "vLLM's to say"
    command = ("vllm", "serve", "--port", "{port}", *lora)
    assert said(engine="command", command=command, aliases=("a", "b")) is None
    assert str(said(engine="command", command=command)).startswith("aliases: the adapter a, b of")


@pytest.mark.parametrize("args", [("--runner", "pooling"), ("--convert=embed",), ("--task", "embedding")])
def test_an_engine_that_makes_vectors_has_that_task(args: tuple[str, ...]) -> None:
    assert f"{args[0].partition('=')[0]}: an engine that makes vectors; say task: embed" in str(said(*args))
    assert said(*args, task="embed") is None
    assert said("--runner", "generate", "--convert", "none") is None


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("run", "--port", "{Port}"), "'{Port}' is not replaced; there are {adapters}, {cafile}, {certfile}, {host}"),
        (("run", "--key={api_key}", "{port}"), "'{api_key}' is not replaced"),
        (("run", "--port", "8000"), "no word has '{port}' or '{socket}' in it"),
    ],
)
def test_a_command_that_nobody_could_ask_is_refused(command: tuple[str, ...], says: str) -> None:
    assert says in str(said(engine="command", command=command))


def test_braces_that_are_no_placeholders_pass() -> None:
    assert said(engine="command", command=("run", "{port}", '{"a": {"b": 1}}', "${X}{{y}}")) is not None
    assert said(engine="command", command=("run", "{port}", '{"a": {"b": 1}}', "{{y}}", "{1}")) is None
    assert said(engine="command", command=("sh", "-c", "run {port} | awk '{print}'")) is None
    assert "put it into command:" in str(said("{port}", engine="command", command=("run", "{port}")))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("https://huggingface.co/Qwen/Qwen3-4B/tree/main", "expected the hub name: Qwen/Qwen3-4B"),
        ("hf://Qwen/Qwen3-4B", "expected the hub name: Qwen/Qwen3-4B"),
        ("https://example.org/x", "expected the hub name: org/name"),
        ("", "expected a folder, or a hub name"),
        ("org/m ", "expected a folder, or a hub name"),
        ("--model=org/m", "expected a folder, or a hub name"),
    ],
)
def test_a_source_that_is_none_is_told_what_one_is(source: str, says: str) -> None:
    assert says in str(said(source=source))


def test_a_nul_is_no_text() -> None:
    assert "NUL" in str(said("--x", "a\0b"))
    assert "NUL" in str(said(engine="command", command=("a\0b", "{port}")))
