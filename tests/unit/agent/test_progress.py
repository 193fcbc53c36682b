"""Whether an engine makes progress: the pure part, and an agent that watches fake engines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.paths import Layout
from serve.agent.progress import Counters, Sample, Verdict, Watch, counters_of, judge, look_every_s, observe
from serve.core.events import EngineExited, EngineMoves, EngineReady, EngineStalled
from tests.support.agents import NAMED, AgentHost, engine_client, eventually, fake_model, private_layout

HANG_S = 60.0
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 10.0
vllm:generation_tokens_total{engine="0",model_name="m"} 7.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 4.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 9.0
process_cpu_seconds_total 12.5
"""


def test_vllms_own_words() -> None:
    assert counters_of(VLLM) == Counters(3, (7.0, 0.25, 10.0, 4.0))
    left = VLLM.replace('"abort",model_name="m"} 9.0', '"abort",model_name="m"} 10.0')
    assert counters_of(left) == counters_of(VLLM), "a client that leaves is no progress"
    assert counters_of(VLLM.replace("0.25", "0.26")) != counters_of(VLLM), "a piece of a long prompt is"


@pytest.mark.parametrize("text", ["", "up 1\n", "vllm:num_requests_running x", "vllm:generation_tokens_total 1\n"])
def test_an_engine_that_counts_otherwise_has_no_counters(text: str) -> None:
    assert counters_of(text) is None


@given(st.text())
def test_garbled_metrics_are_no_counters_and_no_failure(text: str) -> None:
    assert counters_of(text) is None


counters = st.builds(Counters, st.integers(0, 3), st.tuples(st.integers(0, 3).map(float)))
looks = st.lists(
    st.tuples(st.floats(0.1, 30.0), st.none() | counters, st.booleans(), st.integers(0, 2)), min_size=1, max_size=40
)


def watched(story: Sequence[tuple[float, Counters | None, bool, int]]) -> Iterator[tuple[Sample, Watch, Verdict]]:
    """Each look, what it came to, and the verdict then."""
    at, signs = 1000.0, 0
    watch: Watch | None = None
    for after, found, answers, told in story:
        at, signs = at + after, signs + answers
        sample = Sample(at, found, signs, told)
        watch = observe(watch, sample)
        yield sample, watch, judge(watch, at, HANG_S)


@given(looks)
def test_only_one_that_has_work_and_stood_still_for_the_whole_time_hangs(
    story: list[tuple[float, Counters | None, bool, int]],
) -> None:
    """Against the history itself: hung exactly when every look of the last ``HANG_S`` seconds had work and no sign."""
    history: list[tuple[float, bool]] = []
    last: Counters | None = None
    seen = 0
    for sample, watch, verdict in watched(story):
        given_now = sample.counters or last
        busy = bool(sample.told or (given_now and given_now.in_flight))
        changed = given_now is not None and (last is None or given_now.progress != last.progress)
        moved = not history or not busy or changed or sample.signs > seen
        history.append((sample.at, moved))
        last, seen = given_now, sample.signs
        moved_at = max(at for at, moves in history if moves)
        assert watch.moved_at == moved_at
        assert (verdict is Verdict.HUNG) == (sample.at - moved_at >= HANG_S)


@given(looks)
def test_one_that_moves_now_and_then_is_never_ended_however_slow(
    story: list[tuple[float, Counters | None, bool, int]],
) -> None:
    slow = [(after, Counters(3, (float(number),)), False, told) for number, (after, _, _, told) in enumerate(story)]
    assert all(verdict is not Verdict.HUNG for _, _, verdict in watched(slow))


@given(st.floats(0, 1e6), st.floats(1, 86_400))
def test_verdicts_come_in_their_order(still_s: float, hang_after_s: float) -> None:
    verdicts = [judge(Watch(0.0), still_s * part, hang_after_s).value for part in (0.1, 0.3, 0.6, 1.0)]
    assert verdicts == sorted(verdicts)
    assert judge(Watch(0.0), hang_after_s, hang_after_s) is Verdict.HUNG
    assert judge(Watch(0.0), still_s, 0.0) is Verdict.WELL
    assert 0 < look_every_s(hang_after_s) <= 2.0


# --- an agent and fake engines ---
@pytest.fixture
def layout() -> Iterator[Layout]:
    with private_layout() as made:
        yield made


@pytest.fixture
def host(layout: Layout) -> Iterator[AgentHost]:
    made = AgentHost(layout)
    yield made
    made.close()


class Callers:
    """Requests that run beside the test, each in a thread; what became of each."""

    def __init__(self, host: AgentHost, address: str) -> None:
        self.host, self.address = host, address
        self.outcomes: list[str] = []
        self._threads: list[threading.Thread] = []

    def post(self, prompt: str, **body: object) -> None:
        thread = threading.Thread(target=self._post, args=({"prompt": prompt, "max_tokens": 1000, **body},))
        self._threads.append(thread)
        thread.start()

    def _post(self, body: dict[str, object]) -> None:
        try:
            with engine_client(self.host.layout, self.address) as client:
                said = client.post("/v1/completions", json=body, extensions=NAMED)
            self.outcomes.append(str(said.status_code))
        except httpx.TransportError as error:
            self.outcomes.append(type(error).__name__)

    def join(self) -> list[str]:
        for thread in self._threads:
            thread.join(60)
        return self.outcomes


@pytest.mark.process
@pytest.mark.parametrize("options", [("--metrics",), ("--metrics", "--wedge-metrics"), ()])
def test_a_wedged_engine_is_ended_and_says_so_before(host: AgentHost, options: tuple[str, ...]) -> None:
    host.start(fake_model("tiny", "generate", "--ignore-sigterm", *options, hang_after="3s"))
    callers = Callers(host, host.wait(EngineReady).address)
    callers.post("hello")
    assert callers.join() == ["200"]
    began = time.monotonic()
    callers.post("@wedge")
    callers.post("@wedge")
    stop = threading.Event()
    telling = threading.Thread(target=keep_telling, args=(host, stop))
    by_the_edge = options != ("--metrics",)  # it does not count, or does not say: its work is seen at the edge alone
    if by_the_edge:
        telling.start()
    try:
        told = host.wait(EngineStalled, timeout_s=5)
        assert told.still_s >= 1.0
        assert told.in_flight >= 1
        with pytest.raises(AssertionError, match="hung: no progress for 3 s with"):
            host.wait(EngineMoves, timeout_s=10)
    finally:
        stop.set()
        if by_the_edge:
            telling.join()
    exited = next(event for event in host.seen if isinstance(event, EngineExited))
    assert not exited.expected
    assert exited.summary.startswith("hung: no progress for 3 s with")
    assert time.monotonic() - began < 3.0 + 30.0
    assert set(callers.join()[1:]) <= {"RemoteProtocolError", "ReadError"}, "they broke off as in a death"


def keep_telling(host: AgentHost, stop: threading.Event) -> None:
    while not stop.wait(0.2):
        host.call(host.agent.still({"e1": 2, "another": 1}))


@pytest.mark.process
def test_a_slow_engine_that_makes_progress_is_left_alone(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--metrics", "--token-rate", "2", hang_after="2s"))
    callers = Callers(host, host.wait(EngineReady).address)
    callers.post("@tokens=9", stream=True)
    assert callers.join() == ["200"]
    host.poll()
    assert not any(isinstance(event, EngineExited) for event in host.seen)


@pytest.mark.process
@pytest.mark.parametrize("options", [("--metrics",), ()])
def test_one_request_that_takes_long_is_no_hang_where_others_are_answered(
    host: AgentHost, options: tuple[str, ...]
) -> None:
    """A long prompt, say, or an answer whose client reads slowly: the small request in between is answered."""
    host.start(fake_model("tiny", "generate", *options, hang_after="4s"))
    callers = Callers(host, host.wait(EngineReady).address)
    callers.post("@sleep=6")
    stop = threading.Event()
    telling = threading.Thread(target=keep_telling, args=(host, stop))
    telling.start()
    assert callers.join() == ["200"]
    stop.set()
    telling.join()
    host.poll()
    assert not any(isinstance(event, EngineExited | EngineStalled) for event in host.seen)


@pytest.mark.process
def test_an_engine_is_not_asked_anything_while_it_has_nothing_to_do(host: AgentHost) -> None:
    seen = host.layout.state / "seen.jsonl"
    model = fake_model("tiny", "generate", "--record", str(seen), hang_after="1s", isolated=False)
    host.start(model)
    host.wait(EngineReady)

    def asked() -> list[str]:
        return [json.loads(line)["path"] for line in seen.read_text().splitlines()]

    assert eventually(lambda: asked().count("/metrics") == 2)
    time.sleep(1.5)
    paths = asked()
    assert paths.count("/v1/completions") == 1, "the first, that made it ready"
    assert paths.count("/metrics") == 2, "it has none: it was asked when it was ready and once after, and not again"


@pytest.mark.process
def test_with_hang_after_0_nothing_is_ended(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--metrics", hang_after=0))
    callers = Callers(host, host.wait(EngineReady).address)
    callers.post("@wedge")
    assert eventually(lambda: host.describe().engines[0].ready)
    time.sleep(2.0)
    host.poll()
    assert not any(isinstance(event, EngineExited | EngineStalled) for event in host.seen)
    host.stop()
    callers.join()


@pytest.mark.process
def test_an_adopted_engine_is_watched_too(host: AgentHost) -> None:
    host.start(fake_model("tiny", "generate", "--metrics", "--ignore-sigterm", hang_after="1s"))
    host.wait(EngineReady)
    host.crash()
    callers = Callers(host, host.wait(EngineReady).address)
    callers.post("@wedge")
    with pytest.raises(AssertionError, match="hung: no progress"):
        host.wait(EngineMoves)
    callers.join()
