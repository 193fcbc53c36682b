"""What a client can do, whichever way its requests go: collected by a class that says the way (``client``)."""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress

import openai
import pytest

from gateway_plugin import AsyncClient, Client
from gateway_plugin.errors import GatewayError, InvalidRequest, ModelNotFound, WaitDeadline

WRITER, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello @tokens=3"}]
SLOW: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello @sleep=20"}]


def counted(count: int) -> list[str]:
    """Prompts whose answers have as many words more as their number."""
    return [f"hello @tokens={number}" for number in range(1, count + 1)]


class ClientStories:
    """The gateway behind it: a fake engine's conventions for prompts, two models (``WRITER``, ``EMBEDDER``)."""

    resumes = False
    """Whether this way keeps tasks and answers, and so has no streams."""

    @pytest.fixture
    def client(self) -> Iterator[Client]:
        raise NotImplementedError

    def test_a_prompt_has_a_text_for_an_answer(self, client: Client) -> None:
        assert client.chat("hello @tokens=3", WRITER, system="Be brief.").endswith(" w1 w2")
        assert client.chat([{"role": "user", "content": "hello @tokens=2"}], WRITER, temperature=0).endswith(" w1")
        assert client.submit_chat("hello @tokens=2", WRITER).result(60).endswith(" w1")

    def test_openai_is_the_real_one(self, client: Client) -> None:
        assert isinstance(client.openai, openai.OpenAI)
        reply = client.openai.chat.completions.create(model=WRITER, messages=MESSAGES)
        assert (reply.choices[0].message.content or "").endswith(" w1 w2")
        vectors = client.openai.embeddings.create(model=EMBEDDER, input=["a", "b"]).data
        assert [len(entry.embedding) for entry in vectors] == [8, 8]
        assert {WRITER, EMBEDDER} <= {model.id for model in client.openai.models.list()}
        assert client.openai.models.retrieve(WRITER).id == WRITER

    async def test_so_is_async_openai(self, client: Client) -> None:
        assert isinstance(client.async_openai, openai.AsyncOpenAI)
        reply = await client.async_openai.chat.completions.create(model=WRITER, messages=MESSAGES)
        assert (reply.choices[0].message.content or "").endswith(" w1 w2")
        with pytest.raises(openai.NotFoundError):
            await client.async_openai.chat.completions.create(model="nobody", messages=MESSAGES)
        await client.async_openai.close()

    async def test_asyncio_has_the_same_calls(self, client: Client) -> None:
        both = AsyncClient.__new__(AsyncClient)
        both.sync = client
        assert (await both.chat("hello @tokens=2", WRITER)).endswith(" w1")
        assert [text.count(" w") for text in await both.map_chat(counted(5), WRITER)] == [0, 1, 2, 3, 4]
        assert [len(vector) for vector in await both.embed(["a", "b"], EMBEDDER)] == [8, 8]
        assert (await both.model(WRITER)).name == WRITER
        with pytest.raises(ModelNotFound):
            await both.chat("hello", "nobody")

    def test_a_text_has_a_vector(self, client: Client) -> None:
        texts = [f"text {number}" for number in range(70)]
        vectors = client.embed(texts, EMBEDDER)
        assert [len(vector) for vector in vectors] == [8] * 70
        assert client.embed(texts[42], EMBEDDER) == [pytest.approx(vectors[42])]
        assert client.embed([], EMBEDDER) == []

    def test_models_and_their_states(self, client: Client) -> None:
        found = {model.name: model.task for model in client.models()}
        assert (found[WRITER], found[EMBEDDER]) == ("generate", "embed")
        assert client.model(WRITER).task == "generate"
        with pytest.raises(ModelNotFound, match="nobody"):
            client.model("nobody")
        assert client.wait_until_ready(WRITER, timeout_s=60).ready
        assert client.status().online

    def test_an_error_is_the_gateways_own_and_survives_pickling(self, client: Client) -> None:
        with pytest.raises(ModelNotFound, match="nobody") as caught:
            client.chat("hello", "nobody")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), again.status, again.code) == (ModelNotFound, 404, "model_not_found")
        with pytest.raises(InvalidRequest, match="as it was told"):
            client.chat("hello @fail=400", WRITER)
        with pytest.raises(openai.NotFoundError) as said:
            client.openai.chat.completions.create(model="nobody", messages=MESSAGES)
        assert isinstance(client.error_of(said.value), ModelNotFound)

    def test_an_answer_that_does_not_come_ends_at_the_deadline(self, client: Client) -> None:
        began = time.monotonic()
        with pytest.raises(WaitDeadline):
            client.chat("hello @sleep=20", WRITER, timeout_s=1)
        impatient = client.openai.with_options(timeout=1, max_retries=0)
        with pytest.raises(openai.OpenAIError) as said:
            impatient.chat.completions.create(model=WRITER, messages=SLOW)
        assert isinstance(client.error_of(said.value), WaitDeadline)
        assert time.monotonic() - began < 15
        with pytest.raises(InvalidRequest, match="timeout_s"):
            client.chat("hello", WRITER, timeout_s=0)

    def test_many_prompts_are_answered_in_order(self, client: Client) -> None:
        answers = client.map_chat((prompt for prompt in counted(100)), WRITER, concurrency=8)
        assert [answer.count(" w") for answer in answers] == list(range(100))
        assert client.map_chat([], WRITER) == []

    def test_a_prompts_error_ends_a_map_or_takes_its_answers_place(self, client: Client) -> None:
        prompts = ["hello", "hello @fail=400", "hello"]
        with pytest.raises(InvalidRequest, match="as it was told"):
            client.map_chat(prompts, WRITER)
        first, error, third = client.map_chat(prompts, WRITER, return_errors=True)
        assert first.startswith(WRITER)
        assert third.startswith(WRITER)
        assert isinstance(error, InvalidRequest)

    def test_any_path_of_inference_is_taken(self, client: Client) -> None:
        counted = client.submit("/tokenize", {"model": WRITER, "prompt": "one two three"}).result(60)
        assert counted["count"] == 3
        assert client.submit("/v1/models").result(60)["data"]
        with pytest.raises(GatewayError) as caught:
            client.submit("/etc/passwd", {"model": WRITER}).result(60)
        assert caught.value.status in (400, 404)

    def test_an_earlier_map_is_fetched_where_a_service_keeps_it(self, client: Client) -> None:
        group = str(uuid.uuid4())
        if self.resumes:
            client.map_chat(counted(3), WRITER, task_group_id=group)
            assert [answer.count(" w") for answer in client.resume(group)] == [0, 1, 2]
            return
        with pytest.raises(InvalidRequest, match=r"Client\(endpoint=ID\) only"):
            client.map_chat(["a"], WRITER, task_group_id=group)
        with pytest.raises(InvalidRequest, match="resume"):
            client.resume(group)
        with pytest.raises(InvalidRequest, match="map_file"):
            client.map_file("jobs/p.jsonl", "0" * 64, 2)

    def test_options_go_into_the_request_as_openai_puts_them_there(self, client: Client) -> None:
        assert client.chat("hello @tokens=9", WRITER, extra_body={"max_tokens": 2}, timeout=60).count(" w") == 1
        with pytest.raises(InvalidRequest, match="stream"):
            client.chat("hello", WRITER, stream=True)
        with pytest.raises(WaitDeadline):
            client.chat("hello @sleep=20", WRITER, timeout=0.5)

    def test_a_stream_comes_or_is_refused_with_what_to_do(self, client: Client) -> None:
        create = client.openai.chat.completions.create
        if self.resumes:
            with pytest.raises(openai.BadRequestError, match=r"tunnel.*short answers"):
                create(model=WRITER, messages=MESSAGES, stream=True)
            return
        chunks = [
            chunk.choices[0].delta.content or "" for chunk in create(model=WRITER, messages=MESSAGES, stream=True)
        ]
        assert "".join(chunks).endswith(" w1 w2")

    def test_what_was_interrupted_says_what_becomes_of_the_rest(
        self, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(futures: object) -> Iterator[object]:
            raise KeyboardInterrupt

        monkeypatch.setattr("gateway_plugin.channel.as_completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.map_chat(["hello @sleep=20"] * 3, WRITER)
        said = capsys.readouterr().err
        assert "0 of 3 prompts are answered" in said
        assert ("resume('" if self.resumes else "others are cancelled") in said

    def test_leaving_never_waits_for_answers(self, client: Client) -> None:
        began = time.monotonic()
        waiting = client.submit_chat("hello @sleep=20", WRITER)
        client.close()
        with suppress(CancelledError):  # it was not sent yet
            assert isinstance(waiting.exception(5), GatewayError)
        assert time.monotonic() - began < 10
        with pytest.raises(GatewayError, match="closed"):
            client.chat("hello", WRITER)
