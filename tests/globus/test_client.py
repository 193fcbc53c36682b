"""The client over the whole chain: the stories of tests/unit/globus, with the real thing on the way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway_plugin.errors import Forbidden, GatewayError, NotFound, PromptTooLarge, TaskFailed, WaitDeadline
from gateway_plugin.globus import AsyncGlobusClient, GlobusClient
from gateway_plugin.globus.client.batches import Limits
from tests.support.gateways import chat_body, wait_for

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain
    from tests.support.globus.gateway import EngineAsGateway

pytestmark = pytest.mark.globus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(globus_chain: Chain) -> Iterator[GlobusClient]:
    with GlobusClient(globus_chain.endpoint_id, globus_chain.function_id, timeout_s=120) as made:
        yield made


def counted(count: int) -> list[str]:
    """Prompts whose answers tell which they are: the n-th has n words more than the first."""
    return [f"hello @tokens={number}" for number in range(1, count + 1)]


def lengths(answers: list[Any]) -> list[int]:
    """The first token of an answer is the engine's name."""
    return [1 + len([word for word in answer.split() if word.startswith("w")]) for answer in answers]


def test_the_verbs(client: GlobusClient) -> None:
    assert client.status().online
    assert "tiny" in client.chat("hello", "tiny", max_tokens=4)
    assert "tiny" in client.openai.completions.create(model="tiny", prompt="hello").choices[0].text
    with pytest.raises(GatewayError) as caught:
        client.chat("hello", "unknown-model")
    assert caught.value.status in (400, 404)


def test_five_hundred_prompts_come_back_in_order_below_the_limit(globus_chain: Chain, client: GlobusClient) -> None:
    before = globus_chain.counts()
    answers = client.map_chat(counted(500), "tiny")
    assert lengths(answers) == list(range(1, 501))
    after = globus_chain.counts()
    assert after["tasks"] - before.get("tasks", 0) == client.tasks_sent == 8
    assert after.get("refused", 0) == before.get("refused", 0)


def test_a_failed_submission_goes_on_with_a_new_executor(globus_chain: Chain, client: GlobusClient) -> None:
    globus_chain.fail(403)
    with pytest.raises(Forbidden, match="TOLD_TO_FAIL"):
        client.chat("hello", "tiny")
    assert "tiny" in client.chat("hello", "tiny")
    globus_chain.fail(500)
    assert "tiny" in client.chat("hello", "tiny")


def test_packs_queued_behind_a_refused_one_are_sent_again(globus_chain: Chain, client: GlobusClient) -> None:
    globus_chain.fail(403)
    answers = client.map_chat(counted(200), "tiny", return_errors=True)
    refused = [answer for answer in answers if isinstance(answer, Forbidden)]
    assert len(refused) == 64
    assert lengths([answer for answer in answers if not isinstance(answer, GatewayError)]) == list(range(65, 201))


def test_from_the_shell(globus_chain: Chain) -> None:
    command = [sys.executable, "-m", "gateway_plugin.cli.main", "chat", "tiny", "hello", "--endpoint"]
    environment = {**os.environ, "GATEWAY_FUNCTION": globus_chain.function_id}
    said = subprocess.run(
        [*command, globus_chain.endpoint_id], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert said.stdout.startswith("tiny"), said.stderr
    assert said.returncode == 0


async def test_asyncio(globus_chain: Chain) -> None:
    site = await asyncio.to_thread(AsyncGlobusClient, globus_chain.endpoint_id, globus_chain.function_id)
    async with site:
        answers = await asyncio.gather(*(site.chat(prompt, "tiny") for prompt in counted(20)))
        assert lengths(answers) == list(range(1, 21))
        assert site.sync.tasks_sent <= 2


def test_answers_over_the_limit_of_a_result_come_in_several(globus_chain: Chain) -> None:
    """Each is 3.6 MB; four of them are over 10 MB."""
    with GlobusClient(globus_chain.endpoint_id, globus_chain.function_id, timeout_s=120) as client:
        answers = client.map_chat(["x @tokens=500000"] * 4, "tiny")
        assert [length > 400_000 for length in lengths(answers)] == [True] * 4
        assert client.tasks_sent > 1


def test_a_request_near_the_limit_passes_and_one_over_it_is_refused_here(client: GlobusClient) -> None:
    assert "tiny" in client.chat("x" * 9_000_000, "tiny")
    sent = client.tasks_sent
    with pytest.raises(PromptTooLarge, match="map_file"):
        client.chat("x" * 9_600_000, "tiny")
    assert client.tasks_sent == sent


def test_lines_of_a_file_at_the_site(globus_chain: Chain, client: GlobusClient) -> None:
    lines = [
        {"path": "/v1/chat/completions", "body": chat_body("tiny", prompt, max_tokens=64)} for prompt in counted(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    folder = globus_chain.account.home / "input"
    (folder / "prompts.jsonl").write_bytes(text)
    globus_chain.account.own(folder / "prompts.jsonl")
    digest = hashlib.sha256(text).hexdigest()
    group = str(uuid.uuid4())
    answers = client.map_file("prompts.jsonl", digest, 10, start=20, task_group_id=group)
    assert lengths([answer["choices"][0]["message"]["content"] for answer in answers]) == list(range(21, 31))
    assert lengths(client.resume(group)) == list(range(21, 31))
    with pytest.raises(GatewayError, match="SHA-256") as caught:
        client.map_file("prompts.jsonl", "0" * 64, 10)
    assert caught.value.code == "checksum_mismatch"


def test_a_deadline_is_kept_and_leaving_does_not_block(globus_chain: Chain, globus_gateway: EngineAsGateway) -> None:
    began = time.monotonic()
    with GlobusClient(globus_chain.endpoint_id, globus_chain.function_id) as client:
        with pytest.raises(WaitDeadline):
            client.chat("hello @sleep=30", "tiny", timeout_s=4)
        before = len(globus_gateway.seen())
        client.submit_chat("hello @sleep=30", "tiny")
        wait_for(lambda: len(globus_gateway.seen()) > before, 10, "a request that nobody waits for under way")
    assert time.monotonic() - began < 28


def test_the_broker_restarts_under_load_and_nothing_is_lost(
    globus_chain: Chain, globus_gateway: EngineAsGateway
) -> None:
    with GlobusClient(globus_chain.endpoint_id, globus_chain.function_id, limits=Limits(items=16)) as client:
        found: list[Any] = []
        prompts = [f"@sleep=0.2 {prompt}" for prompt in counted(160)]
        before = len(globus_gateway.seen())
        work = threading.Thread(target=lambda: found.extend(client.map_chat(prompts, "tiny", timeout_s=200)))
        work.start()
        wait_for(lambda: len(globus_gateway.seen()) > before + 16, 30, "more than one pack under way")
        globus_chain.broker.kill()
        globus_chain.broker.start()
        work.join(220)
    assert lengths(found) == list(range(1, 161))


_KILLED = """
import sys, uuid
from gateway_plugin.globus import GlobusClient
from gateway_plugin.globus.client.batches import Limits
from tests.globus.test_client import counted

group = str(uuid.uuid4())
print(group, flush=True)
client = GlobusClient(sys.argv[1], sys.argv[2], limits=Limits(items=16))
client.map_chat([f"@sleep=2 {prompt}" for prompt in counted(48)], "tiny", task_group_id=group)
"""


def _start(program: str, chain: Chain) -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen(
        [sys.executable, "-c", program, chain.endpoint_id, chain.function_id],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def test_a_map_is_resumed_after_its_process_was_killed(globus_chain: Chain, client: GlobusClient) -> None:
    sent = globus_chain.counts().get("tasks", 0)
    child, group = _start(_KILLED, globus_chain)
    wait_for(lambda: globus_chain.counts().get("tasks", 0) >= sent + 3, 60, "three packs sent")
    child.kill()
    child.wait()
    asked = globus_chain.counts()["requests"]
    assert lengths(client.resume(group)) == list(range(1, 49))
    assert globus_chain.counts()["requests"] - asked <= 3, "not one for each task"
    with pytest.raises(NotFound):
        client.resume("00000000-0000-0000-0000-000000000000")


def test_ctrl_c_says_how_to_go_on(globus_chain: Chain, client: GlobusClient) -> None:
    sent = globus_chain.counts().get("tasks", 0)
    child, group = _start(_KILLED, globus_chain)
    wait_for(lambda: globus_chain.counts().get("tasks", 0) >= sent + 3, 60, "three packs sent")
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert f"resume('{group}')" in said
    assert lengths(client.resume(group)) == list(range(1, 49))


def test_the_endpoint_is_stopped_with_tasks_pending(globus_chain: Chain, client: GlobusClient) -> None:
    globus_chain.stop()
    sent = globus_chain.counts().get("tasks", 0)
    try:
        future = client.submit_chat("hello", "tiny", timeout_s=120)
        wait_for(lambda: globus_chain.counts().get("tasks", 0) > sent, 30, "a task pending")
        assert not future.done()
    finally:
        globus_chain.start()
    assert "tiny" in future.result(120)


def test_a_function_that_the_endpoint_does_not_allow(globus_chain: Chain) -> None:
    with GlobusClient(globus_chain.endpoint_id, "00000000-0000-0000-0000-000000000001") as client:
        with pytest.raises((Forbidden, NotFound)):
            client.chat("hello", "tiny")


def test_an_option_that_the_endpoint_does_not_know(globus_chain: Chain) -> None:
    with GlobusClient(globus_chain.endpoint_id, globus_chain.function_id, options={"worker_init": "true"}) as client:
        with pytest.raises(TaskFailed, match="worker_init"):
            client.chat("hello", "tiny", timeout_s=30)


def test_another_executor_of_the_process_keeps_its_own_group(globus_chain: Chain, client: GlobusClient) -> None:
    from globus_compute_sdk import Executor

    assert "tiny" in client.chat("hello", "tiny")
    assert Executor._default_task_group_id != client.task_group_id
    other = Executor(globus_chain.endpoint_id)
    assert str(other.task_group_id) != client.task_group_id
    other.shutdown(wait=False, cancel_futures=True)


def test_a_program_that_forgets_to_close_ends(globus_chain: Chain, globus_gateway: EngineAsGateway) -> None:
    program = (
        "import sys\nfrom gateway_plugin.globus import GlobusClient\n"
        "client = GlobusClient(sys.argv[1], sys.argv[2])\n"
        "client.submit_chat('hello @sleep=60', 'tiny')\n"
        "print('sent', flush=True); sys.stdin.readline()"
    )
    before = len(globus_gateway.seen())
    child, said = _start(program, globus_chain)
    assert said == "sent"
    wait_for(lambda: len(globus_gateway.seen()) > before, 30, "its request under way")
    began = time.monotonic()
    _, trouble = child.communicate("over\n", timeout=50)
    assert child.returncode == 0, trouble
    assert time.monotonic() - began < 40
