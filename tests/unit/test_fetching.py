"""Fetching weights with the hub's own client from a stand-in hub on loopback: whole, resumed, refused, two at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_plugin import disk_room, fetching, hub_content
from gateway_plugin.errors import ConfigError, GatewayError, NotFound, ServiceError
from gateway_plugin.fetching import Fetched, Progress, Stopped, fetch
from gateway_plugin.hub_cache import commit_of, lacks, snapshot
from tests.support.agents import eventually
from tests.support.hub import CONFIG, SHA, Hub, Repository, serving, sha256

MIB = 1 << 20
FIRST, SECOND = (random.Random(seed).randbytes(9 * MIB) for seed in (1, 2))
INDEX = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
).encode()
FILES = {
    "config.json": CONFIG,
    "tokenizer/tokenizer.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-00001-of-00002.safetensors": FIRST,
    "model-00002-of-00002.safetensors": SECOND,
    "pytorch_model.bin": FIRST[: 2 * MIB],
}
TOTAL = sum(len(content) for name, content in FILES.items() if name != "pytorch_model.bin")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    with serving({"org/m": Repository(dict(FILES)), "org/gated": Repository(dict(FILES), gated=True)}) as found:
        found.here(monkeypatch, cache)
        monkeypatch.setattr(hub_content, "_pause", lambda *words: None)
        yield found


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_fetched_once_and_by_its_revision(hub: Hub, cache: Path) -> None:
    seen: list[Progress] = []
    done = fetch("org/m", "v1", cache, progress=seen.append)
    assert done.folder == cache / "models--org--m" / "snapshots" / SHA == snapshot(cache, "org/m", "v1")
    assert files_in(done.folder) == {name: content for name, content in FILES.items() if name != "pytorch_model.bin"}
    assert (done.fetched_bytes, done.total_bytes, done.left_out) == (TOTAL, TOTAL, ("pytorch_model.bin",))
    assert seen[-1] == Progress(TOTAL, TOTAL)
    assert lacks(done.folder) == ""
    assert commit_of(cache, "org/m", "v1") == SHA
    sent = dict(hub.sent)
    assert sent == {sha256(FIRST): len(FIRST), sha256(SECOND): len(SECOND)}
    again = fetch("org/m", SHA, cache)
    assert (again.folder, again.fetched_bytes, hub.sent) == (done.folder, 0, sent)
    assert not list(cache.rglob("*.incomplete"))


def test_weights_that_the_hubs_own_client_fetched_are_used(hub: Hub, cache: Path) -> None:
    hub_client = pytest.importorskip("huggingface_hub")
    hub_client.hf_hub_download("org/m", "model-00001-of-00002.safetensors", cache_dir=cache)
    sent = dict(hub.sent)
    fetch("org/m", "", cache)
    assert hub.sent == {**sent, sha256(SECOND): len(SECOND)}
    assert commit_of(cache, "org/m") == SHA


def test_a_connection_that_breaks_is_continued(hub: Hub, cache: Path) -> None:
    hub.breaks = [3 * MIB, 5 * MIB, 0, MIB]
    done = fetch("org/m", "", cache)
    assert files_in(done.folder)["model-00002-of-00002.safetensors"] == SECOND
    twice = sum(hub.sent.values()) - len(FIRST) - len(SECOND)
    assert twice <= 4 * MIB, "of each break less than one MiB is fetched again"


def test_a_server_without_ranges_is_read_from_the_start(hub: Hub, cache: Path) -> None:
    hub.breaks, hub.ranges = [3 * MIB], False
    assert files_in(fetch("org/m", "", cache).folder)["model-00001-of-00002.safetensors"] == FIRST


def test_a_server_in_trouble_is_asked_again_and_one_that_refuses_is_not(hub: Hub, cache: Path) -> None:
    hub.content_status = [503, 429, 408]
    fetch("org/m", "", cache)
    assert not hub.content_status
    shutil.rmtree(cache)
    hub.content_status = [403] * 9
    with pytest.raises(ServiceError) as refused:
        fetch("org/m", "", cache)
    assert "signature" not in refused.value.message, "an address that gives access is in no message"
    assert "\n" not in refused.value.message
    assert len(hub.content_status) >= 9 - 2


def test_damaged_content_is_fetched_again_and_refused_if_it_stays_so(hub: Hub, cache: Path) -> None:
    hub.damages = 1
    assert files_in(fetch("org/m", "", cache).folder)["model-00001-of-00002.safetensors"] == FIRST
    shutil.rmtree(cache)
    hub.damages = 99
    with pytest.raises(ServiceError, match="another SHA-256 than the hub says"):
        fetch("org/m", "", cache)
    found = snapshot(cache, "org/m", SHA)
    assert found is not None
    assert lacks(found) == "there are no weights in it"


def test_a_truncated_file_is_fetched_again(hub: Hub, cache: Path) -> None:
    done = fetch("org/m", "", cache)
    (done.folder / "model-00001-of-00002.safetensors").resolve().write_bytes(FIRST[:100])
    (done.folder / "config.json").resolve().write_bytes(b"")
    assert files_in(fetch("org/m", "", cache).folder)["model-00001-of-00002.safetensors"] == FIRST
    assert files_in(done.folder)["config.json"] == CONFIG


def test_the_token_reaches_the_hub_and_no_other_server(hub: Hub, cache: Path) -> None:
    with pytest.raises(ServiceError, match="org/gated is gated: accept its licence"):
        fetch("org/gated", "", cache)
    with pytest.raises(ServiceError, match="org/gated is gated: accept its licence"):
        fetch("org/gated", "", cache, token="hf_wrong")
    fetch("org/gated", "", cache, token=hub.token)
    assert {said for server, _, _, said in hub.seen if server == "content"} == {""}


@pytest.mark.parametrize(
    ("name", "revision", "error", "words"),
    [
        ("org/none", "", NotFound, "no model 'org/none', or it is private"),
        ("org/m", "gone", NotFound, "org/m has no revision 'gone'"),
        ("org/m/x", "", ConfigError, "is no name of a model"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, cache: Path, name: str, revision: str, error: type[GatewayError],
                                    words: str) -> None:  # fmt: skip
    with pytest.raises(error, match=words):
        fetch(name, revision, cache)
    assert not cache.exists()


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses(hub: Hub, cache: Path, status: int) -> None:
    hub.status = status
    with pytest.raises(GatewayError) as refused:
        fetch("org/m", "", cache)
    assert "\n" not in refused.value.message
    assert ("token" in refused.value.message) == (status < 500)


@pytest.mark.parametrize(
    "file",
    [
        {"rfilename": "../../../../precious.safetensors", "size": 5},
        {"rfilename": "/etc/x.safetensors", "size": 5},
        {"rfilename": "a\n.safetensors", "size": 5},
        {"rfilename": "a.safetensors", "size": "5"},
        {"rfilename": "a.safetensors", "size": -5},
        {"rfilename": "a.safetensors", "size": 9 * MIB, "lfs": {"sha256": "../../../precious.safetensors", "size": 9,
                                                                "pointerSize": 1}},
    ],
    ids=["above", "absolute", "newline", "size-as-text", "size-below-0", "hash"],
)  # fmt: skip
def test_a_list_of_files_that_leads_elsewhere(hub: Hub, tmp_path: Path, file: dict[str, object]) -> None:
    precious = tmp_path / "precious.safetensors"
    precious.write_text("mine")
    hub.listing = json.dumps({"id": "org/m", "sha": SHA, "siblings": [file]}).encode()
    with pytest.raises(ServiceError, match=r"The answer about org/m cannot be used: ") as refused:
        fetch("org/m", "", tmp_path / "hub")
    assert "\n" not in refused.value.message
    assert precious.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == [precious]


@pytest.mark.parametrize("said", [b"<html>Log in to the guest network</html>", b"[]", b"[" * 100_000, b"{}", b'{"id":'])
def test_a_page_that_is_no_hubs_answer(hub: Hub, cache: Path, said: bytes) -> None:
    hub.listing = said
    with pytest.raises(ServiceError, match=r"no proxy's page in between|names no commit"):
        fetch("org/m", "", cache)
    assert not cache.exists()


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_of_any_size_is_not_read(hub: Hub, cache: Path, status: int) -> None:
    hub.listing, hub.listing_status = b" " * (33 << 20) + b"{}", status
    with pytest.raises(ServiceError, match=r"more than 32 MiB.*: look at what answers at http://127.*/org/m \(") as big:
        fetch("org/m", "", cache)
    assert "\n" not in big.value.message


def test_a_refusal_of_any_size_in_place_of_weights_is_not_read(hub: Hub, cache: Path) -> None:
    hub.content_status, hub.refusal = [500] * 9, b" " * (33 << 20)
    with pytest.raises(ServiceError, match="more than 32 MiB"):
        fetch("org/m", "", cache)


def test_a_hub_that_cannot_be_reached(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match=r"org/m: .*refused.*http://127\.0\.0\.1:9"):
        fetch("org/m", "", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match="HF_HUB_OFFLINE is set"):
        fetch("org/m", "", cache)


def test_what_does_not_fit_is_refused_before_it_starts(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/m"].said_sizes = {"model-00003.safetensors": 1 << 60}
    with pytest.raises(ServiceError, match=r"needs 1073741824\.0 GiB, and .* has"):
        fetch("org/m", "", cache)
    assert hub.sent == {}
    hub.repositories["org/m"].said_sizes = {}
    monkeypatch.setattr(fetching, "room_bytes", lambda folder: (TOTAL, "quota"))
    with pytest.raises(ServiceError, match=r"quota of .* leaves 0\.0 GiB"):
        fetch("org/m", "", cache)
    assert hub.requests("resolve") == 0


def test_a_disk_that_fills_up_keeps_what_came(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [4 * MIB]

    def read_range(*given: object) -> None:
        stream, arrived = given[1], given[5]
        room[0] -= stream.write(FIRST[:MIB])  # type: ignore[attr-defined]
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        arrived(stream.tell())  # type: ignore[attr-defined, operator]

    with monkeypatch.context() as full:
        full.setattr(hub_content, "_read_range", read_range)
        with pytest.raises(ServiceError, match=r"No space left on device\. Make room there"):
            fetch("org/m", "", cache)
    assert list(cache.rglob("*.gateway.incomplete"))


def test_patterns_choose_and_a_repository_without_weights_is_refused(hub: Hub, cache: Path) -> None:
    done = fetch("org/m", "", cache, exclude=("tokenizer/", "*.json"))
    assert sorted(files_in(done.folder)) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    done = fetch("org/m", "", cache, include=("*.bin",))
    assert "pytorch_model.bin" in files_in(done.folder)
    with pytest.raises(ConfigError, match=r"org/m: these patterns leave no weights; its files: config\.json, "):
        fetch("org/m", "", cache, exclude=("*",))
    hub.repositories["org/m"].files = {"m-Q4.gguf": b"4", "m-Q8.gguf": b"8", "README.md": b""}
    with pytest.raises(ConfigError, match=r"2 GGUF files, of which an engine loads one: .* --include '\*m-Q4\.gguf'"):
        fetch("org/m", "", cache)
    assert sorted(files_in(fetch("org/m", "", cache, include=("*Q8*",)).folder))[-1] == "pytorch_model.bin"
    hub.repositories["org/m"].files = {"README.md": b""}
    with pytest.raises(ConfigError, match="has no weights"):
        fetch("org/m", "", cache)


def test_a_fetch_is_stopped_and_continued(hub: Hub, cache: Path) -> None:
    hub.chunk_s = 0.01
    stop = threading.Event()

    def report(progress: Progress) -> None:
        if progress.done_bytes > 5 * MIB:
            stop.set()

    with pytest.raises(Stopped):
        fetch("org/m", "", cache, progress=report, stop=stop)
    hub.chunk_s = 0
    before = sum(hub.sent.values())
    done = fetch("org/m", "", cache)
    assert done.fetched_bytes < TOTAL - 4 * MIB
    assert sum(hub.sent.values()) < TOTAL + 4 * MIB, before


@pytest.mark.parametrize("name", ["../../../../precious", "/precious", "a/../../precious", "", "a//b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(hub: Hub, cache: Path, name: str) -> None:
    precious = cache.parent / "precious"
    precious.write_text("kept")
    hub.repositories["org/m"].said_sizes = {name: 5}
    with pytest.raises(ServiceError, match="leads out of its folder"):
        fetch("org/m", "", cache)
    assert precious.read_text() == "kept"
    assert not cache.exists()


def test_the_same_content_under_two_names_comes_once(hub: Hub, cache: Path) -> None:
    hub.repositories["org/m"].files["copy/model-00001-of-00002.safetensors"] = FIRST
    done = fetch("org/m", "", cache)
    assert files_in(done.folder)["copy/model-00001-of-00002.safetensors"] == FIRST
    assert hub.sent == {sha256(FIRST): len(FIRST), sha256(SECOND): len(SECOND)}


def test_two_at_once_fetch_once(hub: Hub, cache: Path) -> None:
    hub.chunk_s = 0.002
    done: list[Fetched] = []
    waited: list[Progress] = []
    threads = [
        threading.Thread(target=lambda: done.append(fetch("org/m", "", cache, progress=waited.append))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.fetched_bytes for one in done) == [0, TOTAL]
    assert any(progress.waits for progress in waited)
    assert hub.sent == {sha256(FIRST): len(FIRST), sha256(SECOND): len(SECOND)}


_FETCH = (
    "import sys; from pathlib import Path; from gateway_plugin.fetching import fetch; "
    "fetch('org/m', '', Path(sys.argv[1]))"
)


@pytest.mark.process
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_fetch_that_is_killed_is_continued_by_the_next(hub: Hub, cache: Path, how: signal.Signals) -> None:
    def kept() -> int:
        return sum(path.stat().st_size for path in cache.rglob("*.gateway.incomplete"))

    hub.chunk_s = 0.02
    environment = {**os.environ, **hub.environment(cache)}
    with subprocess.Popen(
        [sys.executable, "-c", _FETCH, str(cache)], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        assert eventually(lambda: sum(hub.sent.values()) >= 6 * MIB and kept() >= 2 * MIB, 60)
        process.send_signal(how)
        assert process.wait(60) != 0, "it has not gone on to its end"
    found = snapshot(cache, "org/m", SHA)
    assert found is not None
    assert lacks(found) == "there are no weights in it"
    parts = kept()
    assert parts >= 2 * MIB
    hub.chunk_s = 0
    done = fetch("org/m", "", cache)
    assert done.fetched_bytes <= TOTAL - parts
    assert lacks(done.folder) == ""
    assert sum(hub.sent.values()) < TOTAL + 4 * MIB


def test_what_quota_says(tmp_path: Path) -> None:
    said = (
        "Disk quotas for user u (uid 5): \n Filesystem blocks quota limit grace files quota limit grace\n"
        "/dev/a 1000 0 0 0 5 0 0 0\n/dev/b 900* 800 1000 6days 5 0 0 0\n"
    )
    assert disk_room.quota_left(said) == 100 * 1024
    assert disk_room.quota_left("/lustre/x 500 0 2000 - 10 0 0 -\n") == 1500 * 1024
    assert disk_room.quota_left("/lustre/x 500 0 400 - 10 0 0 -\n") == 0
    assert disk_room.quota_left("none\n") is None
    free, limit = disk_room.room_bytes(tmp_path / "not" / "yet")
    assert free > 0
    assert limit in ("disk", "quota")
