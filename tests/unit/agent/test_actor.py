"""The node agent's manners, with fake engines: commands of old epochs, repeats, races, hangs, what others left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.engine_records import engine_folder
from gateway_plugin.errors import ServiceError
from gateway_plugin.paths import Layout
from gateway_plugin.processes import alive, group_members
from serve.agent import records
from serve.agent.actor import AgentSettings, NodeAgent
from serve.agent.warm import Gauges
from serve.core.effects import StopEngine
from serve.core.events import EngineExited, EngineGrew, EngineListening, EngineReady, NodeLeaves
from tests.support.agents import (
    NAMED,
    QUICK,
    AgentHost,
    engine_client,
    eventually,
    fake_model,
    own_block,
    plain_model,
    private_layout,
)
from tests.support.clocks import set_clock
from tests.unit.test_hub_cache import put

pytestmark = pytest.mark.process


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", own_block())
    with private_layout() as made:
        yield made


@pytest.fixture
def host(layout: Layout) -> Iterator[AgentHost]:
    made = AgentHost(layout)
    yield made
    made.close()


def test_it_describes_its_node(host: AgentHost) -> None:
    node = host.describe()
    assert (node.node, node.type, node.block, node.address) == ("node1", "local", own_block(), "127.0.0.1")
    assert (node.host_mib, node.gpu_mib, node.engines) == (4096, (), ())


def test_an_engine_is_found_from_its_start_on(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--load-delay-s", "0.5", memory_gib=0.5))
    (found,) = host.describe().engines
    assert (found.id, found.model, found.memory_mib) == ("e1", "tiny", 512)
    assert (found.ready, found.address) == (False, "")
    ready = host.wait(EngineReady)
    assert ready.max_model_len == 4096, "as the engine says in its /v1/models"
    (found,) = host.describe().engines
    assert (found.ready, found.address, found.loaded_s) == (True, ready.address, ready.load_s)


def test_what_an_engine_holds_is_reported_when_it_is_ready_and_when_it_grows() -> None:
    held = iter((2000, 2040, 2200))
    gauges = Gauges(taken_mib=lambda leader: next(held, 2210))
    with private_layout() as layout:
        host = AgentHost(layout, timing=replace(QUICK, measure_every_s=0.05), gauges=gauges)
        try:
            host.start(fake_model("tiny", "generate"))
            assert host.wait(EngineReady).used_mib == 2000
            assert host.wait(EngineGrew) == EngineGrew("e1", 2200)
            time.sleep(0.3)
            host.poll()
            assert not any(isinstance(event, EngineGrew) for event in host.seen), "a little more is not reported"
        finally:
            host.close()


def test_listening_is_not_ready(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--load-visibly", "--load-delay-s", "1.0"))
    host.wait(EngineListening)
    assert not host.describe().engines[0].ready
    assert host.wait(EngineReady).load_s >= 0.9


def test_healthy_and_unable_to_answer_is_not_ready(host: AgentHost) -> None:
    """It says 200 to /health and 404 to every generation: an embedding engine under a wrong task."""
    model = fake_model("tiny", "embed").model_copy(update={"task": "generate"})
    host.start(model)
    host.wait(EngineListening)
    exited = host.wait(EngineExited)
    assert not exited.expected
    assert "/v1/completions" in exited.reason
    assert "404" in exited.reason
    assert not any(isinstance(event, EngineReady) for event in host.seen)


def test_a_repeated_start_starts_nothing(host: AgentHost) -> None:
    for _ in range(3):
        host.start(fake_model())
    host.wait(EngineReady)
    pid = host.record().pid
    host.start(fake_model())
    assert host.record().pid == pid
    os.kill(pid, signal.SIGKILL)
    assert not host.wait(EngineExited).expected
    host.start(fake_model())  # the same id: its end was reported, the controller decides what comes next
    assert host.describe().engines == ()


def test_commands_of_an_older_epoch_are_dropped(host: AgentHost) -> None:
    host.start(fake_model(), engine="new", epoch=5)
    host.start(fake_model(), engine="old", epoch=4)
    host.stop(engine="new", epoch=4)
    host.wait(EngineReady, engine="new")
    assert [engine.id for engine in host.describe().engines] == ["new"]
    assert not any(isinstance(event, EngineExited) for event in host.seen)


def test_the_epoch_outlives_the_agent(host: AgentHost) -> None:
    host.start(fake_model(), epoch=5)
    host.wait(EngineReady)
    host.crash()
    host.stop(epoch=4)
    assert len(host.describe().engines) == 1


def test_stopping_what_is_not_there_is_answered(host: AgentHost) -> None:
    host.stop(engine="ghost")
    exited = host.wait(EngineExited, engine="ghost")
    assert exited.expected


def test_a_start_overtaken_by_its_stop_starts_nothing(host: AgentHost) -> None:
    host.stop()
    host.start(fake_model())
    assert host.describe().engines == ()
    host.start(fake_model(), engine="e2")
    assert len(host.describe().engines) == 1


def test_an_engine_stopped_while_it_loads_says_how_far_it_came(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--load-delay-s", "60"))
    host.stop(reason="abandoned")
    exited = host.wait(EngineExited)
    assert exited.expected
    assert exited.reason.startswith("abandoned; it was not ready (never listened)")


def test_one_that_ignores_sigterm_is_killed(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--ignore-sigterm", "--children", "1"))
    host.wait(EngineReady)
    record = host.record()
    begun = time.monotonic()
    host.stop()
    assert host.wait(EngineExited).expected
    assert time.monotonic() - begun >= host.timing.grace_s
    assert group_members(record.mark) == ()


def test_children_of_a_killed_leader_are_gone_when_it_is_reported(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--children", "3"))
    host.wait(EngineReady)
    record = host.record()
    assert len(group_members(record.mark)) == 4
    os.kill(record.pid, signal.SIGKILL)
    exited = host.wait(EngineExited)
    assert group_members(record.mark) == ()
    assert not exited.expected
    assert "SIGKILL" in exited.reason


def test_one_that_hangs_is_ended(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--hang-after", "2"))  # the first is the agent's own
    address = host.wait(EngineReady).address
    with engine_client(host.layout, address) as client:
        client.post("/v1/completions", json={"prompt": "x"}, extensions=NAMED)
    exited = host.wait(EngineExited)
    assert not exited.expected
    assert exited.reason.startswith("hung: no good health for")


def test_one_that_is_merely_busy_is_left_alone(host: AgentHost) -> None:
    """A request that takes longer than ``ill_after_s`` while /health answers."""
    host.start(fake_model())
    address = host.wait(EngineReady).address
    with engine_client(host.layout, address) as client, ThreadPoolExecutor(1) as pool:
        body = {"prompt": f"@sleep={1.5 * host.timing.ill_after_s}"}
        answer = pool.submit(client.post, "/v1/completions", json=body, extensions=NAMED)
        assert answer.result(30).status_code == 200
    host.poll()
    assert not any(isinstance(event, EngineExited) for event in host.seen)


def test_one_stopped_by_a_signal_hangs(host: AgentHost) -> None:
    host.start(fake_model())
    host.wait(EngineReady)
    os.kill(host.record().pid, signal.SIGSTOP)
    assert "hung" in host.wait(EngineExited).reason  # SIGKILL ends a stopped process, SIGTERM does not


def test_a_program_that_does_not_exist(host: AgentHost) -> None:
    host.start(fake_model(command=("/no/such/engine", "{port}")))
    exited = host.wait(EngineExited)
    assert "/no/such/engine" in exited.reason
    assert not exited.expected
    assert list(host.layout.engine_records.iterdir()) == []


@pytest.mark.parametrize("told_by", ["entry", "block"])
def test_a_temporary_folder_of_the_site_is_kept(
    host: AgentHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    if told_by == "block":
        monkeypatch.setenv("TMPDIR", str(tmp_path))
    host.start(fake_model("tiny", env={"TMPDIR": str(tmp_path)} if told_by == "entry" else {}))
    host.wait(EngineReady)
    environment = psutil.Process(host.record().pid).environ()
    assert environment["TMPDIR"] == str(tmp_path)
    assert environment["VLLM_RPC_BASE_PATH"] == str(engine_folder(records.record_path(host.layout, "e1")))


@pytest.mark.parametrize("socket", [False, True])
def test_an_engine_starts_where_no_temporary_folder_can_be_made_unless_it_needs_its_socket(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch, socket: bool
) -> None:
    def refuse(*_: object) -> None:
        raise ServiceError("/tmp/gw/doors cannot be made: No space left on device.")

    monkeypatch.setattr("serve.agent.records.make_engine_folder", refuse)
    host.start(plain_model("tiny", socket=True) if socket else fake_model("tiny"))
    if socket:
        assert "No space left" in host.wait(EngineExited).reason
    else:
        host.wait(EngineReady)
        assert "VLLM_RPC_BASE_PATH" not in psutil.Process(host.record().pid).environ()


def test_weights_that_are_not_there(host: AgentHost) -> None:
    model = fake_model(engine="vllm", command=(), source="/no/such/weights")
    host.start(model)
    assert "/no/such/weights" in host.wait(EngineExited).reason


def test_one_broken_engine_harms_no_other(host: AgentHost) -> None:
    host.start(fake_model("good"), engine="good")
    host.start(fake_model("bad", "generate", "--crash-on-start"), engine="bad")
    assert "asked to crash on start" in host.wait(EngineExited, engine="bad").reason
    host.wait(EngineReady, engine="good")
    assert [engine.id for engine in host.describe().engines] == ["good"]


LEAKY = (
    "import os, sys, time; print('RuntimeError: bad token', os.environ['HF_TOKEN'], os.environ['KIND'], flush=True); "
    "time.sleep(float(os.environ['FOR_S'])); sys.exit(3)"
)


def leaky_model(for_s: str) -> Model:
    """An engine that prints its environment's secret, and ends with exit code 3 after that time."""
    env = {"HF_TOKEN": "hf_abcdefgh", "KIND": "spawn", "FOR_S": for_s}
    return fake_model(command=("{python}", "-c", LEAKY), env=env)


def test_secrets_of_its_environment_are_masked_and_the_summary_has_no_words(host: AgentHost) -> None:
    host.start(leaky_model("0"))
    exited = host.wait(EngineExited)
    assert exited.reason == "it ended with exit code 3: RuntimeError: bad token *** spawn"
    assert exited.summary == "it ended with exit code 3"


def test_secrets_of_an_adopted_engine_are_masked_too(host: AgentHost) -> None:
    host.start(leaky_model("60"))
    record = host.record()
    assert "hf_abcdefgh" not in repr(record)
    assert eventually(lambda: b"hf_abcdefgh" in Path(record.log).read_bytes())
    host.crash()
    host.describe()
    os.kill(record.pid, signal.SIGKILL)
    assert host.wait(EngineExited).reason == "it ended: RuntimeError: bad token *** spawn"


def test_an_engine_that_could_not_be_started_says_no_more_to_users(host: AgentHost) -> None:
    host.start(fake_model(command=("/no/such/hf_abcdefgh",), env={"HF_TOKEN": "hf_abcdefgh"}))
    exited = host.wait(EngineExited)
    assert "/no/such/***" in exited.reason
    assert exited.summary == "it could not be started"


def test_weights_that_are_not_fetched_end_a_start_at_once(layout: Layout, tmp_path: Path) -> None:
    host = AgentHost(layout, fetched=tmp_path / "hub")
    try:
        host.start(fake_model(source="org/none@v1", command=("run", "{source}")))
        exited = host.wait(EngineExited)
        assert exited.reason.endswith(f"org/none@v1 are not in {tmp_path}/hub; run `gateway models fetch tiny`")
    finally:
        host.close()


TELLS = (
    "import os, sys; told = [os.environ.get(name) for name in ('HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HF_TOKEN')]; "
    "print(sys.argv[1], *told, flush=True); sys.exit(3)"
)


def test_fetched_weights_are_loaded_from_their_folder_without_the_hub(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_block")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    cache = tmp_path / "hub"
    folder = put(cache, "model.safetensors")
    host = AgentHost(layout, fetched=cache)
    try:
        host.start(fake_model(source=f"org/m@{folder.name}", command=("{python}", "-c", TELLS, "{source}")))
        assert host.wait(EngineExited).reason.endswith(f": {folder} 1 {cache} None")
    finally:
        host.close()


def test_events_wait_and_are_numbered(layout: Layout) -> None:
    async def story() -> None:
        agent = NodeAgent(AgentSettings("n", "local", str(layout.state), 1, (), on_loopback=True))
        assert await agent.events(0, 0.01) == (0, ())
        pollers = [asyncio.create_task(agent.events(0, 30)) for _ in range(3)]
        await asyncio.sleep(0)
        await agent.stop(StopEngine("ghost", "n", 1, "x"))
        for last, events in await asyncio.wait_for(asyncio.gather(*pollers), 5):
            assert last == 1
            assert events == (EngineExited("ghost", "x; it was not there", expected=True),)
        await agent.stop(StopEngine("ghost2", "n", 1, "x"))
        last, events = await agent.events(1, 5)
        assert (last, events) == (2, (EngineExited("ghost2", "x; it was not there", expected=True),))
        assert (await agent.events(2, 0.01)) == (2, ())
        assert len((await agent.events(0, 5))[1]) == 2
        last, events = await agent.events(77, 5)  # numbers of an agent that is no more
        assert (last, len(events)) == (2, 2)

    asyncio.run(story())


def test_an_agent_made_again_finds_an_engine_that_still_loads(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--load-visibly", "--load-delay-s", "1"))
    pid = host.record().pid
    host.crash()
    (found,) = host.describe().engines
    assert not found.ready
    assert host.wait(EngineReady).load_s >= 0.9
    assert host.record().pid == pid


def test_an_engine_that_died_while_nobody_looked_is_reported(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--children", "2"))
    host.wait(EngineReady)
    record = host.record()
    host.crash()
    os.kill(record.pid, signal.SIGKILL)  # its children stay, and hold its memory
    assert eventually(lambda: len(group_members(record.mark)) == 2)
    assert host.describe().engines == ()
    assert group_members(record.mark) == ()
    assert not host.wait(EngineExited).expected
    assert list(host.layout.engine_records.iterdir()) == []


def test_an_adopted_engine_that_dies_is_reported(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--children", "1"))
    host.wait(EngineReady)
    record = host.record()
    host.crash()
    host.wait(EngineReady)
    os.kill(record.pid, signal.SIGKILL)
    assert not host.wait(EngineExited).expected
    assert group_members(record.mark) == ()


def test_engines_of_another_agent_on_this_block_are_ended(layout: Layout) -> None:
    first = AgentHost(layout, node="node1")
    second = AgentHost(layout, node="node2")
    try:
        first.start(fake_model())
        first.wait(EngineReady)
        record = first.record()
        first.call(first.agent.shutdown(end_engines=False))
        assert second.describe().engines == ()
        assert group_members(record.mark) == ()
        assert list(layout.engine_records.iterdir()) == []
    finally:
        first.close()
        second.close()


def test_another_blocks_engines_are_left_alone(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    first = AgentHost(layout, node="node1")
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", own_block("b"))
    second = AgentHost(layout, node="node2")
    try:
        first.start(fake_model())
        first.wait(EngineReady)
        assert second.describe().engines == ()
        assert alive(first.record().mark)
    finally:
        first.close()
        second.close()


def test_a_stranger_with_a_recorded_pid_is_not_touched(host: AgentHost) -> None:
    host.start(fake_model())
    host.wait(EngineReady)
    record = host.record()
    host.stop()
    host.wait(EngineExited)
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        records.write(host.layout, record.model_copy(update={"pid": stranger.pid}))
        host.crash()
        assert host.describe().engines == ()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_shutdown_leaves_no_process(host: AgentHost) -> None:
    for name in ("e1", "e2"):
        host.start(fake_model("tiny", "generate", "--children", "1"), engine=name)
        host.wait(EngineReady, engine=name)
    found = [host.record(name) for name in ("e1", "e2")]
    host.call(host.agent.shutdown())
    assert all(group_members(record.mark) == () for record in found)
    assert list(host.layout.engine_records.iterdir()) == []


def test_a_notice_of_its_block_is_told_once(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BLOCK_FOLDER", str(layout.run))
    host = AgentHost(layout)
    try:
        host.poll()
        assert host.notices == []
        (layout.run / ".notice").write_text('{"until": 1700000000, "reason": "preempted"}')
        (layout.run / ".notice").rename(layout.run / "notice")
        host.poll(wait_s=20)
        assert host.notices == [NodeLeaves("node1", 1700000000.0, "preempted")]
        host.poll(wait_s=0.6)
        assert len(host.notices) == 1
        host.crash()  # the next agent, and the next controller, are told too
        host.poll(wait_s=20)
        assert len(host.notices) == 2
    finally:
        host.close()


def test_a_notice_that_is_none_harms_nobody(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GATEWAY_BLOCK_FOLDER", str(layout.run))
    (layout.run / "notice").write_text("{}")
    host = AgentHost(layout)
    try:
        host.poll()
        assert eventually(lambda: "not a notice" in caplog.text)
        host.start(fake_model())
        host.wait(EngineReady)
        assert host.notices == []
    finally:
        host.close()


def test_it_says_how_many_gpus_there_are(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"0,1": 2, "0,1,2,3": 4, "0,1,2,3,4": 4, "": 4}  # without names nobody can say
    for names, there in given.items():
        monkeypatch.setenv("GATEWAY_VISIBLE_DEVICES", names)
        host = AgentHost(layout, gpu_mib=(1000,) * 4)
        try:
            assert host.describe().gpu_mib == (1000,) * there
        finally:
            host.close()
    assert caplog.text.count("gpus missing node=node1 given=2 expected=4") == 1


def test_two_engines_have_the_devices_that_the_controller_chose(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the batch system's names for them: on this node the controller's 0 to 3."""
    monkeypatch.setenv("GATEWAY_VISIBLE_DEVICES", "4,5,GPU-c,MIG-d")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # Ray's doing
    host = AgentHost(layout, gpu_mib=(1000,) * 4)
    try:
        for engine, gpus in {"e1": (1, 3), "e2": (0, 2)}.items():
            host.start(fake_model(engine, gpus=2), engine, gpus=gpus)
        shown = {}
        for engine in ("e1", "e2"):
            host.wait(EngineReady, engine)
            shown[engine] = psutil.Process(host.record(engine).pid).environ()["CUDA_VISIBLE_DEVICES"]
        assert shown == {"e1": "5,MIG-d", "e2": "4,GPU-c"}
    finally:
        host.close()


STEPS = pytest.mark.parametrize("step_s", [3, 3600, -3600])


@STEPS
def test_an_engine_is_stopped_after_the_clock_was_set(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch, step_s: int
) -> None:
    host.start(fake_model())
    host.wait(EngineReady)
    record = host.record()
    set_clock(monkeypatch, step_s)
    (found,) = host.describe().engines
    assert abs(time.time() - found.started) < 30  # by the clock as it is now
    host.stop()
    assert host.wait(EngineExited).expected
    assert not alive(record.mark)
    assert not psutil.pid_exists(record.pid)


@STEPS
def test_an_engine_is_adopted_and_stopped_after_the_clock_was_set(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch, step_s: int
) -> None:
    host.start(fake_model())
    host.wait(EngineReady)
    record = host.record()
    set_clock(monkeypatch, step_s)
    host.crash()
    (found,) = host.describe().engines
    assert (found.id, found.ready) == ("e1", True)
    host.stop()
    assert host.wait(EngineExited).expected
    assert not alive(record.mark)


def test_an_engine_of_an_earlier_version_is_adopted_and_has_a_record_of_this_one(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.start(fake_model())
    host.wait(EngineReady)
    record = host.record()
    records.write(host.layout, record.model_copy(update={"ticks": 0, "boot": ""}))
    host.crash()
    assert [found.id for found in host.describe().engines] == ["e1"]
    assert host.record().mark == record.mark
    set_clock(monkeypatch, 3600)
    host.stop()
    assert host.wait(EngineExited).expected
    assert not alive(record.mark)


def test_what_a_controller_has_had_is_not_told_to_the_next_one(host: AgentHost) -> None:
    host.start(fake_model())
    host.wait(EngineReady)
    host.poll()  # asks past them
    joined, after = host.call(host.agent.describe())
    assert [engine.id for engine in joined.engines] == ["e1"]
    assert host.call(host.agent.events(after, 0.0)) == (after, ())
    host.stop()
    assert eventually(lambda: len(host.call(host.agent.events(after, 0.1))[1]) == 1)
    _, after = host.call(host.agent.describe())
    assert len(host.call(host.agent.events(after, 0.0))[1]) == 1, "nobody had it yet"


def test_a_notice_is_told_to_every_controller(host: AgentHost) -> None:
    notice = NodeLeaves("node1", 99.0, "scancel")
    host.describe()
    host.agent._leaves = notice
    for _ in range(2):
        _, after = host.call(host.agent.describe())
        _, events = host.call(host.agent.events(after, 0.0))
        assert notice in events
        host.call(host.agent.events(host.agent._last, 0.0))


def test_an_engine_on_a_node_with_a_full_disk_serves_and_is_recorded_when_there_is_room(
    host: AgentHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("gateway_plugin.state_file.write_private", no_room)
        host.start(fake_model())
        host.wait(EngineReady)
        assert not records.record_path(host.layout, "e1").exists()
    assert eventually(lambda: records.record_path(host.layout, "e1").exists())
    assert host.record().ready
    host.stop()
    assert host.wait(EngineExited).expected
    assert not records.record_path(host.layout, "e1").exists()


def test_the_ids_of_engines_that_an_agent_remembers_are_bounded(host: AgentHost) -> None:
    for number in range(2100):
        host.stop(engine=f"e{number}")
    assert len(host.agent._known) == 2000
    assert "e2099" in host.agent._known
