"""The endpoint, called as a remote workflow calls it: real Executor, real broker, real agent and workers.

Where something must not happen, the test looks for its effect. The stand-in leaves the allow-list to the agent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.gateways import wait_for
from tests.support.ports import free_ports

if TYPE_CHECKING:
    from tests.support.globus.chain import Chain
    from tests.support.globus.gateway import EngineAsGateway

pytestmark = [pytest.mark.globus, pytest.mark.timeout(180)]


_ENVIRONMENT = dict(os.environ)
"""As it was before this process was led to the stand-in."""


def pack(*texts: str, **more: Any) -> dict[str, Any]:
    items = [
        {"path": "/v1/chat/completions", "body": {"model": "tiny", "messages": [{"role": "user", "content": text}]}}
        for text in texts
    ]
    made = {"version": 1, "key": uuid.uuid4().hex, "deadline_s": 60, "wait": True} | more
    return made if "input" in made else {"items": items} | made


def statuses(answer: dict[str, Any]) -> list[int]:
    return [item["status"] for item in answer["items"]]


class Payload:
    """What an attacker pickles: unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def trace(globus_chain: Chain) -> Iterator[Path]:
    """A file that the endpoint's user could make, and that no test may find."""
    path = globus_chain.account.home / f"trace-{uuid.uuid4().hex}"
    yield path
    assert not path.exists(), "the caller's code ran"


@contextmanager
def refused(words: str) -> Iterator[None]:
    """The task, or its submission, ends in an error that says ``words``."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the SDK raises its own, the endpoint's come as text
        yield
    assert words in str(caught.value), caught.value


def test_a_call_is_answered_and_the_gateway_hears_for_whom(
    globus_chain: Chain, globus_gateway: EngineAsGateway
) -> None:
    answer = globus_chain.call(pack("hello", "again"))
    assert statuses(answer) == [200, 200]
    assert "tiny" in answer["items"][0]["body"]["choices"][0]["message"]["content"]
    headers = dict(globus_gateway.seen()[-1]["headers"])
    assert headers["x-gateway-caller"] == "11111111-aaaa-4444-8888-000000000001"
    assert headers["authorization"] == f"Bearer {globus_gateway.key}"


def test_status_says_what_is_allowed_and_done(globus_chain: Chain) -> None:
    before = json.loads(globus_chain.cli("status", "--json").stdout)
    globus_chain.call(pack("one"))
    after = json.loads(globus_chain.cli("status", "--json").stdout)
    assert after["state"] == "online"
    assert after["heartbeat_age_s"] < 60
    assert after["tasks_done"] == before["tasks_done"] + 1
    assert [function["id"] for function in after["functions"]] == [globus_chain.function_id]
    words = globus_chain.cli("status").stdout
    assert globus_chain.endpoint_id in words
    assert "online" in words
    assert globus_chain.endpoint_id in globus_chain.cli("list").stdout


def test_another_function_is_not_run(globus_chain: Chain, trace: Path) -> None:
    from globus_compute_sdk import Client

    source = f"def other(request):\n    open({str(trace)!r}, 'w').close()\n"
    other = Client().register_source_code(source, "other")
    with globus_chain.executor() as executor, refused("not permitted"):
        executor.submit_to_registered_function(other, args=({},)).result(60)


def test_a_pickled_argument_is_not_unpickled(globus_chain: Chain, trace: Path) -> None:
    with globus_chain.executor(serializer=None, result_serializers=None) as executor, refused("erializ"):
        executor.submit_to_registered_function(globus_chain.function_id, args=(Payload(trace),)).result(60)


def test_an_option_is_refused_whatever_it_is(globus_chain: Chain, trace: Path) -> None:
    for option in ({"worker_init": f"touch {trace}"}, {"endpoint_setup": f"touch {trace}"}, {"workers": 64}):
        with globus_chain.executor(user_endpoint_config=option) as executor, refused("dditional properties"):
            executor.submit_to_registered_function(globus_chain.function_id, args=(pack("x"),)).result(60)


def test_a_request_over_the_services_limit_is_not_taken(globus_chain: Chain) -> None:
    before = globus_chain.counts()["tasks"]
    executor = globus_chain.executor()
    future = executor.submit_to_registered_function(globus_chain.function_id, args=(pack("x" * 11 * 2**20),))
    with refused("TASK_PAYLOAD_TOO_LARGE"):
        future.result(60)
    executor.shutdown(wait=False, cancel_futures=True)
    assert globus_chain.counts()["tasks"] == before


def test_of_answers_over_the_limit_the_last_large_one_is_an_error(globus_chain: Chain) -> None:
    answer = globus_chain.call(pack("@tokens=700000", "@tokens=800000", "small"), within_s=120)
    assert statuses(answer) == [200, 413, 200]
    assert answer["items"][1]["error"]["code"] == "result_too_large"


def test_a_caller_names_no_address_and_no_file_outside(globus_chain: Chain, globus_gateway: EngineAsGateway) -> None:
    seen = len(globus_gateway.seen())
    key_file = {"path": "../.config/endpoint.key", "sha256": "0" * 64, "start": 0, "count": 1}
    for bad, code in (
        (pack("x", url="http://127.0.0.1:1"), "unknown_option"),
        (pack("x", items=[{"path": "/metrics"}]), "path_not_allowed"),
        (pack(input=key_file), "input_not_allowed"),
        (pack(input={**key_file, "path": "/etc/passwd"}), "input_not_allowed"),
    ):
        assert globus_chain.call(bad)["error"]["code"] == code
    assert len(globus_gateway.seen()) == seen


def test_a_gateway_that_is_down_is_said_to_be(globus_chain: Chain) -> None:
    site = globus_chain.site_file
    before = site.read_text()
    (port,) = free_ports(1)
    site.write_text(json.dumps({**json.loads(before), "url": f"http://127.0.0.1:{port}"}))
    try:
        answer = globus_chain.call(pack("x", deadline_s=50))
    finally:
        site.write_text(before)
    assert answer["items"][0]["error"]["code"] == "gateway_unreachable"
    assert answer["seconds"] < 20


def test_nothing_listens_for_strangers(globus_chain: Chain) -> None:
    globus_chain.call(pack("x"))
    found = [
        connection.laddr.ip
        for process in psutil.process_iter(["uids", "environ"])
        if process.info["uids"].real == globus_chain.account.uid
        and str(globus_chain.account.home) in str(process.info["environ"])
        for connection in connections(process, "inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(found) >= 4, "broker, its port mapper, the agent's interchange"
    assert set(found) <= {"127.0.0.1", "::1"}


def connections(process: psutil.Process, kind: str = "tcp4") -> list[Any]:
    """None if it has ended since it was listed."""
    try:
        return list(process.net_connections(kind))
    except psutil.NoSuchProcess:
        return []


def who_asks(chain: Chain, gateway: EngineAsGateway) -> list[psutil.Process]:
    """The workers that have a request open at the gateway."""
    port = urlsplit(gateway.url).port
    return [
        process
        for process in psutil.process_iter(["uids"])
        if process.info["uids"].real == chain.account.uid
        and any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in connections(process))
    ]


def test_a_pack_whose_worker_is_killed_is_done_by_another_once(
    globus_chain: Chain, globus_gateway: EngineAsGateway
) -> None:
    wait_for(lambda: not who_asks(globus_chain, globus_gateway), 90, "what other tests left being done")
    seen = len(globus_gateway.seen())
    executor = globus_chain.executor()
    future = executor.submit_to_registered_function(globus_chain.function_id, args=(pack("quick", "@sleep=6"),))
    wait_for(lambda: len(globus_gateway.seen()) == seen + 2, 60, "the pack is worked on")
    (worker,) = who_asks(globus_chain, globus_gateway)
    worker.kill()
    assert statuses(future.result(60)) == [200, 200]
    assert len(globus_gateway.seen()) == seen + 3, "what was answered before is not asked again"

    future = executor.submit_to_registered_function(globus_chain.function_id, args=(pack("@sleep=60"),))
    killed: set[int] = set()

    def killed_twice() -> bool:
        for found in who_asks(globus_chain, globus_gateway):
            killed.add(found.pid)
            found.kill()
        return len(killed) == 2

    wait_for(killed_twice, 60, "its worker was killed, and the next one")
    with refused("WorkerLost"):
        future.result(60)
    executor.shutdown()


def test_tasks_that_wait_run_when_the_endpoint_is_back(globus_chain: Chain) -> None:
    globus_chain.stop()
    assert globus_chain.cli("status", check=False).returncode == 3
    executor = globus_chain.executor()
    futures = [
        executor.submit_to_registered_function(globus_chain.function_id, args=(pack(str(number)),))
        for number in range(3)
    ]
    wait_for(lambda: all(future.task_id for future in futures), 30, "the service has them")
    globus_chain.start()
    assert [statuses(future.result(90)) for future in futures] == [[200]] * 3
    executor.shutdown()


@pytest.mark.timeout(300)
def test_a_broker_killed_and_restarted_under_load_loses_no_work(
    globus_chain: Chain, globus_gateway: EngineAsGateway
) -> None:
    """The agent (4.19) forgets results that a dying broker had not confirmed, and the SDK's thread may give up after
    five tries; a pack that is sent again under its key is answered with what was computed then.
    """
    seen = len(globus_gateway.seen())
    packs = [pack(f"@sleep=0.5 number {number}") for number in range(30)]
    executor = globus_chain.executor()
    futures = [executor.submit_to_registered_function(globus_chain.function_id, args=(each,)) for each in packs]
    wait_for(lambda: all(future.task_id for future in futures), 60, "the service has them")
    wait_for(lambda: sum(future.done() for future in futures) >= 5, 60, "some are done")
    globus_chain.broker.kill()
    globus_chain.broker.start()
    ended = wait(futures, 60).done
    answered = {number for number, future in enumerate(futures) if future in ended and not future.exception()}
    executor.shutdown(wait=False, cancel_futures=True)
    again = globus_chain.executor()
    futures = [
        future
        if number in answered
        else again.submit_to_registered_function(globus_chain.function_id, args=(packs[number],))
        for number, future in enumerate(futures)
    ]
    assert [statuses(future.result(60)) for future in futures] == [[200]] * 30
    again.shutdown(wait=False, cancel_futures=True)
    assert len(globus_gateway.seen()) == seen + 30, "nothing was computed twice"


def test_a_multi_user_endpoint_becomes_the_mapped_user_with_that_users_own_key(
    globus_chain: Chain, globus_gateway: EngineAsGateway
) -> None:
    from tests.support.globus.chain import multi_user

    if os.getuid() != 0:
        pytest.skip("a multi-user endpoint needs root")
    with multi_user(globus_chain, globus_gateway.url, globus_gateway.key) as shared:
        answer = shared.call(pack("hello"), within_s=120)
        assert statuses(answer) == [200], answer
        headers = dict(globus_gateway.seen()[-1]["headers"])
        assert headers["x-gateway-caller"] == "11111111-aaaa-4444-8888-000000000001"
        assert headers["authorization"] == f"Bearer {globus_gateway.key}"
        (kept,) = (shared.folder / "mapped/.local/state/gateway-plugin").glob("*/*.jsonl")
        assert kept.stat().st_uid == kept.parent.stat().st_uid == shared.account.uid != 0
        assert json.loads(shared.cli("status", "--json").stdout)["tasks_done"] is None
        assert processes_of(shared)
        shared.cli("restart")
        assert statuses(shared.call(pack("again"), within_s=120)) == [200]
        assert kept.exists(), "for packs that are repeated"
        shared.stop()
        assert not processes_of(shared), "the mapped user's have ended too"
        assert list(kept.parent.glob("*.jsonl")) == []


def processes_of(chain: Chain) -> list[int]:
    """The user endpoints' and their workers', which read the endpoint's site file."""
    site_file = str(chain.folder / "shared" / f"{chain.name}.site.json")
    return [
        process.pid
        for process in psutil.process_iter(["uids", "environ"])
        if process.info["uids"].real == chain.account.uid and site_file in (process.info["environ"] or {}).values()
    ]


def test_a_real_endpoint_answers() -> None:
    """Opt-in: an endpoint at Globus Compute itself, and its model."""
    names = ("GATEWAY_TEST_GLOBUS_ENDPOINT", "GATEWAY_TEST_GLOBUS_FUNCTION", "GATEWAY_TEST_GLOBUS_MODEL")
    endpoint, function, model = (os.environ.get(name) for name in names)
    if endpoint is None or function is None or model is None:
        pytest.skip(f"the real service is asked where {', '.join(names)} and a Globus login are given")
    program = """
import sys
from gateway_plugin.globus import GlobusClient
endpoint, function, model = sys.argv[1:]
with GlobusClient(endpoint, function, timeout_s=150) as client:
    print(client.chat("Say hello.", model))
    print(len(client.map_chat([f"Count to {number}." for number in range(1, 6)], model)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, endpoint, function, model],
        capture_output=True, text=True, timeout=170, env=_ENVIRONMENT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    *said, count = ended.stdout.splitlines()
    assert said
    assert count == "5"
