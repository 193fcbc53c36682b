"""The verbs, over a transport in this process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import multiprocessing
import os
import pty
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import openai
import pytest

from gateway_plugin.errors import (
    ConfigError,
    EndpointUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NothingSaid,
    PromptTooLarge,
    TaskFailed,
    WaitDeadline,
)
from gateway_plugin.globus import AsyncGlobusClient, GlobusClient
from gateway_plugin.globus.client import channel
from gateway_plugin.globus.client.batches import Limits, Pace
from tests.support.fake_endpoint import FakeTransport, echo
from tests.support.gateways import wait_for

QUICK: dict[str, Any] = {"limits": Limits(flush_s=0.005), "pace": Pace(10_000, 1.0)}


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def client(transport: FakeTransport) -> Iterator[GlobusClient]:
    with GlobusClient(transport=transport, limits=Limits(flush_s=0.005), pace=Pace(10_000, 1.0)) as made:
        yield made


def site(answers: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that answers each prompt with ``answers(item)``."""
    return lambda request: {**echo({**request, "items": []}), "items": [answers(item) for item in request["items"]]}


def test_chat_gives_the_text_and_sends_what_was_asked(client: GlobusClient, transport: FakeTransport) -> None:
    assert client.chat("hello", "m", system="be brief", temperature=0) == "re: hello"
    request = transport.requests[0]
    assert request["items"] == [
        {
            "path": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
                "temperature": 0,
            },
        }
    ]
    assert request["wait"] is True
    assert 3500 < request["deadline_s"] < 3600


def test_messages_are_taken_as_they_are(client: GlobusClient) -> None:
    assert client.chat([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}], "m") == "re: two"


def test_files_are_refused_with_what_to_do_instead(client: GlobusClient, transport: FakeTransport) -> None:
    sound = ("a.wav", b"RIFF")
    for ask in (
        lambda: client.openai.audio.transcriptions.create(model="m", file=sound),
        lambda: client.openai.audio.speech.create(model="m", voice="v", input="x"),
        lambda: client.openai.images.edit(model="m", image=sound, prompt="x"),
    ):
        with pytest.raises(openai.BadRequestError, match="takes or answers with a file"):
            ask()
    with pytest.raises(InvalidRequest, match="takes or answers with a file"):
        client.submit("/v1/audio/speech", {"model": "m"})
    assert transport.requests == []


def test_streaming_is_refused_with_what_to_do_instead(client: GlobusClient, transport: FakeTransport) -> None:
    for ask in (
        lambda: client.chat("x", "m", stream=True),
        lambda: client.submit("/v1/chat/completions", {"model": "m", "stream": True}),
    ):
        with pytest.raises(InvalidRequest, match=r"tunnel.*short answers"):
            ask()
    assert client.chat("x", "m", stream=False) == "re: x"
    assert "stream" not in transport.requests[0]["items"][0]["body"]


def test_vectors_come_as_numbers_whatever_the_engine_gives(client: GlobusClient, transport: FakeTransport) -> None:
    packed = base64.b64encode(struct.pack("<2f", 0.5, -1.0)).decode()
    data = [{"index": 1, "embedding": [1, 2]}, {"index": 0, "embedding": packed}]
    transport.infer = site(lambda item: {"status": 200, "body": {"object": "list", "data": data}})
    assert client.embed(["a", "b"], "m") == [[0.5, -1.0], [1.0, 2.0]]


@pytest.mark.parametrize("embedding", [[10**400], [[[]]], "====", {"a": 1}])
def test_a_hostile_answer_ends_its_own_prompt_and_not_the_client(
    client: GlobusClient, transport: FakeTransport, embedding: object
) -> None:
    data = [{"index": 0, "embedding": embedding}]
    transport.infer = site(lambda item: {"status": 200, "body": {"object": "list", "data": data}})
    with pytest.raises(TaskFailed, match="another form"):
        client.embed("a", "m")
    (found,) = client.resume(client.task_group_id)
    assert isinstance(found, TaskFailed), "in its place, and the others' answers are there"
    transport.infer = echo
    assert client.chat("hello", "m") == "re: hello"


def test_an_answer_that_went_into_thinking_is_an_error_in_its_place(
    client: GlobusClient, transport: FakeTransport
) -> None:
    choice = {"index": 0, "finish_reason": "length", "message": {"content": None, "reasoning_content": "Hm"}}
    transport.infer = site(lambda item: {"status": 200, "body": {"object": "chat.completion", "choices": [choice]}})
    with pytest.raises(NothingSaid, match="raise max_tokens"):
        client.chat("a", "m")
    (found,) = client.map_chat(["a"], "m", return_errors=True)
    assert isinstance(found, NothingSaid)
    (resumed,) = client.resume(client.task_group_id)
    assert isinstance(resumed, NothingSaid)
    whole = client.submit("/v1/chat/completions", {"model": "m", "messages": []}).result()
    assert whole["choices"] == [choice], "who asks for the whole answer has it"


def test_a_map_of_more_prompts_than_a_group_holds_is_refused(
    client: GlobusClient, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "GROUP_PROMPTS", 2)
    assert client.map_chat(["a", "b"], "m") == ["re: a", "re: b"]
    with pytest.raises(InvalidRequest, match="make several"):
        client.map_chat(["a", "b", "c"], "m")
    assert len(transport.sent) == 1


def test_many_texts_are_several_requests_of_one_task(client: GlobusClient, transport: FakeTransport) -> None:
    def vectors(item: dict[str, Any]) -> dict[str, Any]:
        data = [{"index": i, "embedding": [float(text)]} for i, text in enumerate(item["body"]["input"])]
        return {"status": 200, "body": {"object": "list", "data": data}}

    transport.infer = site(vectors)
    assert client.embed([str(n) for n in range(100)], "m") == [[float(n)] for n in range(100)]
    assert sum(len(request["items"]) for request in transport.requests) == 4
    assert client.embed("7", "m") == [[7.0]]
    assert client.embed([], "m") == []


def test_five_hundred_prompts_are_eight_tasks_and_come_back_in_order(
    client: GlobusClient, transport: FakeTransport
) -> None:
    assert client.map_chat((str(n) for n in range(500)), "m") == [f"re: {n}" for n in range(500)]
    assert [len(request["items"]) for request in transport.requests] == [64] * 7 + [52]
    assert client.tasks_sent == 8


def test_prompts_of_many_threads_travel_together(transport: FakeTransport) -> None:
    with GlobusClient(transport=transport, limits=Limits(flush_s=0.3), pace=Pace(10_000, 1.0)) as client:
        found: list[str] = []
        threads = [threading.Thread(target=lambda n=n: found.append(client.chat(str(n), "m"))) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == sorted(f"re: {n}" for n in range(20))
    assert len(transport.requests) < 20


def test_a_maps_error_ends_it_or_takes_its_answers_place(client: GlobusClient, transport: FakeTransport) -> None:
    def second_fails(item: dict[str, Any]) -> dict[str, Any]:
        if item["body"]["messages"][0]["content"] == "b":
            return {"status": 503, "error": {"code": "model_unavailable", "message": "broken", "state": "failed"}}
        return {"status": 200, "body": echo({"key": "", "items": [item]})["items"][0]["body"]}

    transport.infer = site(second_fails)
    with pytest.raises(ModelUnavailable, match="broken"):
        client.map_chat(["a", "b", "c"], "m")
    first, error, third = client.map_chat(["a", "b", "c"], "m", return_errors=True)
    assert (first, third) == ("re: a", "re: c")
    assert isinstance(error, ModelUnavailable)
    assert error.state == "failed"
    assert client.map_chat([], "m") == []


def test_a_cold_model_is_said_at_once_to_who_does_not_wait(client: GlobusClient, transport: FakeTransport) -> None:
    cold = {"code": "model_loading", "message": "it loads", "state": "loading", "eta_s": 42}
    transport.infer = site(lambda item: {"status": 503, "error": cold})
    with pytest.raises(GatewayError) as caught:
        client.chat("x", "m", wait=False)
    assert (caught.value.state, caught.value.eta_s, caught.value.status) == ("loading", 42.0, 503)
    assert transport.requests[0]["wait"] is False


def test_a_lost_task_ends_in_time(transport: FakeTransport) -> None:
    transport.held = True
    with GlobusClient(transport=transport, timeout_s=0.2, limits=Limits(flush_s=0.005)) as client:
        began = time.monotonic()
        with pytest.raises(WaitDeadline, match="resume"):
            client.chat("x", "m")
        assert time.monotonic() - began < 30


def test_leaving_with_something_under_way_does_not_block(transport: FakeTransport) -> None:
    transport.held = True
    began = time.monotonic()
    with GlobusClient(transport=transport, limits=Limits(flush_s=0.005)) as client:
        future = client.submit_chat("x", "m")
        wait_for(lambda: transport.sent, 10, "the task is sent")
    assert time.monotonic() - began < 30
    assert isinstance(future.exception(60), EndpointUnavailable)
    assert transport.closed
    with pytest.raises(EndpointUnavailable, match="closed"):
        client.chat("x", "m")


def test_closing_ends_what_waits_here_with_an_error_of_ours(transport: FakeTransport) -> None:
    client = GlobusClient(transport=transport, limits=Limits(flush_s=60.0))
    found: list[BaseException] = []

    def ask(verb: Callable[[], object]) -> None:
        try:
            verb()
        except BaseException as error:  # noqa: BLE001 - whatever it is
            found.append(error)

    verbs = (lambda: client.chat("a", "m"), lambda: client.map_chat(["b", "c"], "m"))
    threads = [threading.Thread(target=ask, args=(verb,)) for verb in verbs]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(client._globus.batcher._waiting) == 2, 10, "both wait for company")
    client.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in found] == [EndpointUnavailable] * 2
    assert transport.sent == []


def test_a_closed_client_takes_nothing_and_waits_for_nothing(transport: FakeTransport) -> None:
    client = GlobusClient(transport=transport, limits=Limits(flush_s=60.0))
    waiting = client.submit_chat("a", "m")
    client.close()
    assert waiting.cancelled()
    began = time.monotonic()
    client.release("of-an-earlier-map")
    client.close()
    assert time.monotonic() - began < 40, "of the minute that a task waits for others"
    with pytest.raises(EndpointUnavailable, match="closed"):
        client.submit_chat("b", "m")


def test_a_mistake_of_ours_ends_every_wait(client: GlobusClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(now: float) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(client._globus.batcher, "turn", broken)
    with pytest.raises(EndpointUnavailable):
        client.chat("a", "m")
    with pytest.raises(EndpointUnavailable, match="closed"):
        client.chat("b", "m")


def test_what_is_wrong_is_said_before_anything_is_sent(client: GlobusClient, transport: FakeTransport) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        client.chat("x", "m", stop=object())
    with pytest.raises(PromptTooLarge, match="map_file"):
        client.chat("x" * 10_000_000, "m")
    with pytest.raises(InvalidRequest, match="timeout_s"):
        client.chat("x", "m", timeout_s=0)
    with pytest.raises(InvalidRequest, match="timeout_s"):
        GlobusClient(transport=transport, timeout_s=10**6)
    assert transport.sent == []


def test_ids_are_checked_and_their_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_ENDPOINT", raising=False)
    monkeypatch.delenv("GATEWAY_FUNCTION", raising=False)
    with pytest.raises(ConfigError, match="GATEWAY_ENDPOINT"):
        GlobusClient()
    with pytest.raises(ConfigError, match="endpoint id"):
        GlobusClient("my-endpoint", "00000000-0000-0000-0000-000000000000")


def test_a_group_is_resumed_in_order_with_its_gaps(client: GlobusClient, transport: FakeTransport) -> None:
    client.map_chat([str(n) for n in range(130)], "m")
    group = transport.sent[0][0]
    lost = transport._futures.pop(1)
    assert lost[1]["items"][0]["body"]["messages"][0]["content"] == "64"
    found = client.resume(group)
    assert found[:64] == [f"re: {n}" for n in range(64)]
    assert all(isinstance(entry, TaskFailed) for entry in found[64:128])
    assert found[128:] == ["re: 128", "re: 129"]
    assert client.resume("another") == []


def test_a_map_has_the_task_group_that_its_user_chose(client: GlobusClient, transport: FakeTransport) -> None:
    group = str(uuid.uuid4())
    client.map_chat(["a", "b"], "m", task_group_id=group)
    client.map_chat(["c"], "m", task_group_id=group.upper())  # once more, after the first
    assert [there for there, _ in transport.sent] == [group, group]
    assert client.resume(group) == ["re: a", "re: b", "re: c"]
    for wrong in ("my-map", client.task_group_id):
        with pytest.raises(InvalidRequest, match="task_group_id"):
            client.map_chat(["a"], "m", task_group_id=wrong)
    with GlobusClient(transport=transport, task_group_id=group, **QUICK) as another:
        assert another.chat("d", "m") == "re: d"
        assert another.resume(group) == ["re: a", "re: b", "re: c", "re: d"]


def test_a_map_of_a_group_whose_map_is_under_way_is_refused(transport: FakeTransport) -> None:
    transport.held = True
    group = str(uuid.uuid4())
    with GlobusClient(transport=transport, **QUICK) as client:
        first = threading.Thread(target=lambda: client.map_chat(["a"], "m", task_group_id=group))
        first.start()
        wait_for(lambda: transport.sent, 10, "the first map under way")
        with pytest.raises(InvalidRequest, match="in use"):
            client.map_chat(["b"], "m", task_group_id=group)
        transport.held = False
        transport.answer_all()
        first.join(60)
        assert client.map_chat(["b"], "m", task_group_id=group) == ["re: b"]


def test_lines_from_the_middle_of_a_file_are_resumed_as_many_as_they_are(
    client: GlobusClient, transport: FakeTransport
) -> None:
    client.map_file("jobs/p.jsonl", "0" * 64, 2, start=1000)
    assert transport.requests[0]["input"]["start"] == 1000
    assert client.resume(transport.sent[0][0]) == ["re: line 1000", "re: line 1001"]


def test_ctrl_c_in_a_map_says_how_to_go_on(
    client: GlobusClient, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(futures: list[Future[Any]]) -> Iterator[Future[Any]]:
        wait_for(lambda: futures[0].done(), 10, "the first answer")
        yield futures[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("gateway_plugin.channel.as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.map_chat(["a", "b"], "m")
    group = transport.sent[0][0]
    assert f"resume('{group}')" in capsys.readouterr().err
    assert client.resume(group) == ["re: a", "re: b"]


def _catalog(*models: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return site(lambda item: {"status": 200, "body": {"data": list(models)}})


def test_models_and_status(client: GlobusClient, transport: FakeTransport) -> None:
    transport.infer = _catalog({"id": "m", "task": "embed", "state": "cold", "aliases": ["short"]})
    assert [(model.name, model.state) for model in client.models()] == [("m", "cold")]
    assert client.model("short").task == "embed"
    assert transport.requests[0]["items"] == [{"path": "/v1/models"}]
    with pytest.raises(ModelNotFound, match="Known models: m"):
        client.model("other")
    assert client.status().online
    transport.state = {"status": "offline", "details": {"total_workers": 4}}
    assert not client.status().online
    assert client.status().details == {"total_workers": 4}
    transport.state = {"status": "offline"}
    assert client.status().details == {}


@pytest.mark.process
def test_in_a_forked_process_it_says_that_each_needs_a_client_of_its_own(client: GlobusClient) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def ask() -> None:
        with pytest.raises(EndpointUnavailable) as caught, client:
            client.chat("hello", "m")
        theirs.send(caught.value)

    child = context.Process(target=ask)
    child.start()
    try:
        assert ours.poll(60), "the child hangs"
        assert "a client in each process" in ours.recv().message
        assert client.chat("hello", "m") == "re: hello"
    finally:
        child.kill()
        child.join()


def test_headers_do_not_travel_through_globus(client: GlobusClient, transport: FakeTransport) -> None:
    with pytest.raises(InvalidRequest, match=r"extra_headers.*got authorization") as caught:
        client.chat("hello", "m", extra_headers={"Authorization": "Bearer secret"})
    assert "secret" not in str(caught.value)
    assert client.chat("hello", "m", extra_headers={"x-gateway-wait": "0"}) == "re: hello"
    (request,) = transport.requests
    assert (request["wait"], sorted(request["items"][0]["body"])) == (False, ["messages", "model"])


def test_waiting_for_a_model_has_it_loaded(client: GlobusClient, transport: FakeTransport) -> None:
    states = iter(["cold", "loading", "ready"])
    touched: list[bool] = []

    def infer(request: dict[str, Any]) -> dict[str, Any]:
        if request["items"][0]["path"] == "/v1/models":
            return _catalog({"id": "m", "state": next(states)})(request)
        touched.append(request["wait"])
        return site(lambda item: {"status": 503, "error": {"code": "wait_deadline", "message": "loading"}})(request)

    transport.infer = infer
    assert client.wait_until_ready("m", poll_s=0.01).ready
    assert touched == [False]


def test_waiting_for_a_model_ends(client: GlobusClient, transport: FakeTransport) -> None:
    transport.infer = _catalog({"id": "m", "state": "loading", "eta_s": 0.01})
    with pytest.raises(WaitDeadline, match="loading"):
        client.wait_until_ready("m", timeout_s=2.0, poll_s=0.01)


async def test_the_same_verbs_for_asyncio(transport: FakeTransport) -> None:
    async with AsyncGlobusClient(transport=transport, **QUICK) as client:
        assert await client.chat("a", "m") == "re: a"
        assert await client.map_chat(["a", "b"], "m") == ["re: a", "re: b"]
        assert (await client.status()).online
        transport.infer = site(lambda item: {"status": 404, "error": {"code": "model_not_found", "message": "no m"}})
        errors = await client.map_chat(["a"], "m", return_errors=True)
        assert isinstance(errors[0], ModelNotFound)
        with pytest.raises(ModelNotFound):
            await client.chat("a", "m")
    assert transport.closed


async def test_asyncio_has_every_verb(transport: FakeTransport) -> None:
    group = str(uuid.uuid4())
    async with AsyncGlobusClient(transport=transport, **QUICK) as client:
        answers = await client.map_file("p.jsonl", "0" * 64, 2, start=7, task_group_id=group)
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == ["re: line 7", "re: line 8"]
        assert await client.resume(group) == ["re: line 7", "re: line 8"]
        assert await client.submit_chat("a", "m") == "re: a"
        transport.held = True
        waiting = client.submit_chat("b", "m")
        assert waiting.cancel()
        transport.held = False
        vector = {"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}
        transport.infer = site(lambda item: {"status": 200, "body": vector})
        assert await client.embed("text", "m") == [[0.5]]
        transport.infer = _catalog({"id": "m", "task": "generate", "state": "ready"})
        assert (await client.model("m")).ready


async def test_a_map_of_asyncio_is_cancelled_and_resumed(transport: FakeTransport) -> None:
    transport.held = True
    group = str(uuid.uuid4())
    options = {**QUICK, "limits": Limits(items=2, under_way=1, flush_s=0.005)}
    async with AsyncGlobusClient(transport=transport, **options) as client:
        work = asyncio.create_task(client.map_chat(["a", "b", "c"], "m", system="briefly", task_group_id=group))
        await asyncio.to_thread(wait_for, lambda: transport.sent, 10, "the first pack sent")
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        transport.held = False
        transport.answer_all()
        assert await client.map_chat(["d"], "m", task_group_id=group) == ["re: d"]
        first, second, missing, last = await client.resume(group)
        assert (first, second, last) == ("re: a", "re: b", "re: d")
        assert isinstance(missing, TaskFailed)


def test_a_file_at_the_site_travels_by_name(client: GlobusClient, transport: FakeTransport) -> None:
    answers = client.map_file("jobs/p.jsonl", "0" * 64, 1000, start=10)
    assert len(answers) == 1000
    assert answers[999]["choices"][0]["message"]["content"] == "re: line 1009"
    assert [(r["input"]["start"], r["input"]["count"]) for r in transport.requests] == [(10, 512), (522, 488)]


_WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ({absent}):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import gateway_plugin.globus
from gateway_plugin.globus import AsyncGlobusClient, GlobusClient
"""


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.process
def test_imported_it_needs_neither_the_sdk_nor_openai() -> None:
    """Both take seconds to import: they are imported when they are used."""
    absent = "'ray', 'vllm', 'torch', 'parsl', 'openai', 'click', 'yaml', 'serve', 'psutil', 'globus_compute_sdk'"
    ended = _python(_WITHOUT.format(absent=absent) + "import gateway_plugin.apps, gateway_plugin.compute")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.process
def test_an_endpoint_is_asked_without_openai() -> None:
    program = _WITHOUT.format(absent="'openai'") + (
        "from tests.support.fake_endpoint import FakeTransport\n"
        "with GlobusClient(transport=FakeTransport()) as client: print(client.map_chat(['a', 'b'], 'm'))"
    )
    assert _python(program).stdout == "['re: a', 're: b']\n"


@pytest.mark.process
def test_without_the_sdk_the_extra_is_named() -> None:
    program = _WITHOUT.format(absent="'globus_compute_sdk', 'globus_sdk'") + (
        "from gateway_plugin.errors import ConfigError\n"
        "try: GlobusClient(*['00000000-0000-0000-0000-000000000000'] * 2)\n"
        "except ConfigError as error: print(error)"
    )
    ended = _python(program)
    assert "gateway-plugin[globus]" in ended.stdout, ended.stderr


_BAR = """
from gateway_plugin.globus import GlobusClient
from tests.support.fake_endpoint import FakeTransport
with GlobusClient(transport=FakeTransport()) as client:
    client.map_chat([str(n) for n in range(70)], "a-model", progress={progress})
    client.resume(client.task_group_id, progress={progress})
"""


def _on_a_terminal(program: str) -> str:
    """What a program shows on stderr, where that is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the last one has closed it
            while piece := os.read(ours, 65536):
                shown += piece
        os.close(ours)
    assert child.returncode == 0, shown
    return shown.decode()


@pytest.mark.process
@pytest.mark.parametrize("progress", [True, None])
def test_a_bar_on_a_terminal_counts_answers(progress: bool | None) -> None:
    shown = _on_a_terminal(_BAR.format(progress=progress))
    assert "a-model" in shown
    assert "70/70" in shown
    assert "tasks of" in shown


@pytest.mark.process
def test_no_bar_where_none_is_wanted_or_there_is_no_terminal() -> None:
    assert _on_a_terminal(_BAR.format(progress=False)) == ""
    ended = _python(_BAR.format(progress=None))
    assert (ended.returncode, ended.stderr) == (0, "")


_LEFT_OPEN = """
from gateway_plugin.globus import GlobusClient
from tests.support.fake_endpoint import FakeTransport
client = GlobusClient(transport=FakeTransport(held=True))
client.submit_chat("x", "m")
print("end of the program")
"""


@pytest.mark.process
def test_a_program_that_forgets_to_close_still_ends() -> None:
    began = time.monotonic()
    ended = _python(_LEFT_OPEN)
    assert ended.stdout == "end of the program\n", ended.stderr
    assert ended.returncode == 0
    assert time.monotonic() - began < 30
