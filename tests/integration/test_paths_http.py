"""Sound, pictures and large bodies through the whole gateway, cold and warm, by the real ``openai`` client."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from gateway_plugin import Client
from tests.support.fake_media import sound_of
from tests.support.gateways import Gateway, chat_body, fake_model, gateway, wait_for

pytestmark = [pytest.mark.process, pytest.mark.integration, pytest.mark.timeout(300)]

MIB = 1 << 20
FORM = "multipart/form-data; boundary=b"
BODY_BYTES = 24 * MIB
SOUND = b'RIFF\r\n--\r\n{"model": "other"}' + bytes(range(256)) * 16


@pytest.fixture(scope="module")
def running() -> Iterator[Gateway]:
    with gateway(
        lambda memory: {
            "whisper": fake_model(memory, "--media", memory_gib=0.1, aliases=["whisper-1"]),
            "other": fake_model(memory, memory_gib=0.1),
            "base": fake_model(
                memory,
                "--enable-lora",
                "--lora-modules",
                "{adapters}",
                memory_gib=0.1,
                adapters={"fr": adapter(memory.parent / "fr")},
            ),
        },
        limits={"body_bytes": BODY_BYTES},
    ) as made:
        yield made


def adapter(folder: Path, rank: int = 8) -> str:
    """A LoRA adapter, as far as it is looked at before an engine loads it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    (folder / "adapter_model.safetensors").touch()
    return str(folder)


@pytest.fixture(scope="module")
def client(running: Gateway) -> Iterator[Client]:
    with Client(running.url, running.key, ca=running.layout.ca) as made:
        yield made


def heard(sound: bytes, model: str = "whisper") -> str:
    return f"{model} heard {len(sound)} bytes {hashlib.sha256(sound).hexdigest()[:8]}"


def unload(running: Gateway, name: str) -> None:
    with running.client() as client:
        client.post("/gateway/v1/models/unload", json={"model": name}).raise_for_status()
        wait_for(lambda: client.get(f"/v1/models/{name}").json()["state"] == "cold", 30, f"{name} is cold")


@pytest.fixture(scope="module")
def plain(running: Gateway) -> Iterator[openai.OpenAI]:
    """The client that everybody has: it sets no header."""
    http: Any = httpx.Client(verify=running.trust, timeout=60)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, http_client=http) as made:
        yield made


@pytest.mark.parametrize("way", ["plain", "naming"])
@pytest.mark.parametrize("size", [len(SOUND), 5 * MIB])
def test_speech_is_transcribed_cold_and_warm(
    running: Gateway, client: Client, plain: openai.OpenAI, way: str, size: int
) -> None:
    sound = SOUND * (size // len(SOUND))
    caller = client.openai if way == "naming" else plain
    unload(running, "whisper")
    for model in ("whisper", "whisper-1", "whisper"):
        for audio in (caller.audio.transcriptions, caller.audio.translations):
            assert audio.create(model=model, file=("a.wav", sound)).text == heard(sound, model)


def test_a_transcription_as_text_and_as_a_stream(running: Gateway, client: Client, plain: openai.OpenAI) -> None:
    unload(running, "whisper")
    for caller in (plain, client.openai):
        audio: Any = caller.audio.transcriptions
        assert audio.create(model="whisper", file=("a", SOUND), response_format="text") == heard(SOUND)
        events = [event.delta for event in audio.create(model="whisper", file=("a", SOUND), stream=True)]
        assert " ".join(events) == heard(SOUND)


def test_speech_is_made_and_streamed_as_bytes(running: Gateway, client: Client, plain: openai.OpenAI) -> None:
    unload(running, "whisper")
    for caller in (plain, client.openai):
        with caller.audio.speech.with_streaming_response.create(
            model="whisper", voice="a", input="glacier", response_format="wav"
        ) as answer:
            assert answer.headers["content-type"] == "audio/wav"
            assert b"".join(answer.iter_bytes()) == sound_of("glacier")


def test_pictures_are_made_and_edited(running: Gateway, client: Client, plain: openai.OpenAI) -> None:
    for caller in (plain, client.openai):
        made = caller.images.generate(model="whisper", prompt="a glacier")
        assert made.data is not None
        assert base64.b64decode(made.data[0].b64_json or "") == b"a glacier"


@pytest.mark.parametrize(
    ("content", "content_type", "says"),
    [
        (b'{"model": "nobody"}', "application/json", "takes a form"),
        (b"--b\r\n\r\n", "multipart/form-data", "no boundary"),
        (
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhis',
            "multipart/form-data; boundary=b",
            "cut off",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--',
            "multipart/form-data; boundary=b",
            "no field",
        ),
    ],
    ids=["json", "boundary", "cut", "nameless"],
)
def test_a_malformed_form_is_refused_in_openais_form(
    running: Gateway, content: bytes, content_type: str, says: str
) -> None:
    with running.client() as caller:
        headers = {"content-type": content_type}
        answer = caller.post("/v1/audio/transcriptions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert says in answer.json()["error"]["message"]
        assert caller.post("/v1/chat/completions", json=chat_body("whisper")).status_code == 200
        warm = caller.post(
            "/v1/audio/transcriptions", content=content, headers={**headers, "x-gateway-model": "whisper"}
        )
    assert warm.status_code in (400, 422), "its engine says so"


@pytest.mark.parametrize("named", [True, False])
def test_a_form_in_chunks_is_taken_and_one_over_the_limit_is_not(running: Gateway, named: bool) -> None:
    request = httpx.Request("POST", "http://g", data={"model": "whisper"}, files={"file": ("a.wav", SOUND * 100)})
    form = request.read()
    headers = {"content-type": request.headers["content-type"], **({"x-gateway-model": "whisper"} if named else {})}

    def pieces(end: int) -> Iterator[bytes]:
        sent = 0
        while sent < end:
            yield form
            sent += len(form)

    with running.client() as caller:
        answer = caller.post("/v1/audio/transcriptions", content=pieces(1), headers=headers)
        assert answer.json() == {"text": heard(SOUND * 100)}
        answer = caller.post("/v1/audio/transcriptions", content=pieces(BODY_BYTES + MIB), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("mib", [1, 5, 20])
def test_a_large_picture_in_a_chat_is_taken_wherever_its_model_stands(
    running: Gateway, client: Client, mib: int
) -> None:
    """As a data URL. Named in the header or first it goes to the engine at once, else by the ingress."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (mib * MIB)}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}]
    last, first = {"messages": messages, "model": "other"}, {"model": "other", "messages": messages}
    assert running.chat("other").status_code == 200
    ways = {}
    with running.client() as caller:
        for way, body, headers in (
            ("last", last, {}), ("first", first, {}), ("named", last, {"x-gateway-model": "other"}),
        ):  # fmt: skip
            content = json.dumps(body).encode()
            began = time.monotonic()
            answer = caller.post("/v1/chat/completions", content=content, headers=headers)
            ways[way] = time.monotonic() - began
            assert answer.status_code == 200, answer.text
    print(f"{mib} MiB:", {way: f"{seconds:.3f} s" for way, seconds in ways.items()})
    chats: Any = client.openai.chat.completions
    assert chats.create(model="other", messages=messages).model == "other"
    sizes = range(mib * MIB, (mib + 1) * MIB)
    where = wait_for(
        lambda: len(found := [line["where"] for line in usage(running) if line["bytes_in"] in sizes]) == 4 and found,
        10,
        lambda: f"the usage log has all of them: {usage(running)[-6:]}",
    )
    assert [place.split("/")[0].rstrip("0123456789") for place in where] == ["ingress", "slot", "slot", "slot"]


def with_adapters(running: Gateway, adapters: dict[str, str] | None) -> dict[str, Any]:
    """The catalog with these adapters of ``base``."""
    document: dict[str, Any] = yaml.safe_load(running.catalog.read_text())
    document["models"]["base"]["adapters"] = adapters
    return document


def apply(running: Gateway, document: dict[str, Any]) -> httpx.Response:
    with running.client() as caller:
        return caller.post("/gateway/v1/models/apply", json=document)


def answers(running: Gateway, name: str) -> str:
    answer = running.chat(name)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"]).split(" request=")[0]


def test_adapters_are_models_of_their_own_and_come_and_go_without_a_reload(running: Gateway, tmp_path: Path) -> None:
    fr = str(running.folder / "fr")
    pid = answers(running, "fr").removeprefix("fr ")
    assert answers(running, "base") == f"base {pid}"
    with running.client() as caller:
        cards = {card["id"]: card for card in caller.get("/v1/models").json()["data"]}
        assert (cards["fr"]["root"], cards["fr"]["parent"], cards["base"]["parent"]) == ("base", "base", None)
        assert caller.get("/v1/models/fr").json()["state"] == "ready"
    with Client(running.url, running.key, ca=running.layout.ca) as client:
        assert client.model("fr").adapters == ("fr",)
        assert client.chat("hello", "fr").startswith("fr ")
    assert apply(running, with_adapters(running, {"fr": fr, "de": adapter(tmp_path / "de")})).status_code == 200
    assert [answers(running, name) for name in ("de", "fr", "base")] == [f"{n} {pid}" for n in ("de", "fr", "base")]
    assert apply(running, with_adapters(running, {"de": adapter(tmp_path / "de-2")})).status_code == 200
    assert answers(running, "de") == f"de {pid}"
    assert running.chat("fr").status_code == 404


def test_an_adapter_that_is_not_there_or_whose_name_is_taken_is_refused_in_a_line(running: Gateway) -> None:
    fr = str(running.folder / "fr")
    pid = answers(running, "base")
    for adapters, says in (
        ({"fr": fr, "it": "/no/such/adapter"}, "adapters.it: there is no LoRA adapter in /no/such/adapter"),
        ({"other": fr}, "the name 'other' of model 'other' is taken by model 'base'"),
        ({"base": fr}, "is taken by model 'base'"),
        ({"a;b": fr}, "a model name matches"),
        ({"it": "relative/folder"}, "expected a folder in full"),
    ):
        refused = apply(running, with_adapters(running, adapters))
        assert refused.status_code == 400, adapters
        message = refused.json()["error"]["message"]
        assert says in message
        assert "\n" not in message
    assert answers(running, "base") == pid


def usage(running: Gateway) -> list[dict[str, Any]]:
    """The usage log's lines for the models."""
    lines = [json.loads(line) for line in running.layout.usage_log.read_text().splitlines()]
    return [line for line in lines if line["method"] == "POST" and line["model"] != "-"]


def test_the_usage_log_has_a_line_for_each_of_them(running: Gateway, client: Client, plain: openai.OpenAI) -> None:
    assert client.openai.audio.transcriptions.create(model="whisper", file=("a", SOUND)).text == heard(SOUND)
    with running.client() as caller:
        answer = caller.post("/v1/audio/translations", data={"model": "whisper-1"}, files={"file": ("a.wav", SOUND)})
    assert (answer.status_code, "x-gateway-found-model" in answer.headers) == (200, False)
    wanted = ("/v1/audio/translations", "whisper-1", 200)
    wait_for(lambda: wanted in [(line["path"], line["model"], line["status"]) for line in usage(running)], 10, "a line")
    exported = running.cli("usage", "export-trace", "--names").stdout
    assert ",8b-whisper,1," in exported


def test_others_are_answered_as_before(running: Gateway) -> None:
    with running.client() as caller:
        assert caller.post("/v1/chat/completions", json=chat_body("other")).status_code == 200
        assert caller.post("/v1/audio/transcription", json={}).status_code == 404
        assert caller.get("/v1/audio/transcriptions").status_code == 405
        assert caller.post("/v1/load_lora_adapter", json={}).status_code == 404
