"""``gateway models fetch``, ``weights`` and ``prune``, against a stand-in hub on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway_plugin.cli.main import cli
from gateway_plugin.cli.weights import rate, size, transfer_words
from gateway_plugin.fetching import Progress
from gateway_plugin.hub_cache import fetch_lock, snapshot
from gateway_plugin.processes import Mark
from tests.support.agents import eventually
from tests.support.answering import answering
from tests.support.hub import CONFIG, SHA, Hub, Repository, serving
from tests.support.owner_doors import URL
from tests.support.terminal import Terminal

MIB = 1 << 20
OTHER = "0" * 39 + "2"
CONTENT = bytes(range(256)) * (5 * MIB // 256)


@dataclass
class Place:
    """A site with a weights folder of its own, and a catalog."""

    folder: Path
    hub: Hub

    @property
    def cache(self) -> Path:
        return self.folder / "weights"

    def words(self, *words: str) -> list[str]:
        site, models = str(self.folder / "site.py"), str(self.folder / "models.yaml")
        return ["--state", str(self.folder / "state"), "models", *words, "--site", site, "--models", models]

    def gateway(self, *words: str, given: str = "") -> tuple[int, str]:
        runner = CliRunner(env={"GATEWAY_URL": "", "COLUMNS": "200"})
        done = runner.invoke(cli, self.words(*words), input=given, catch_exceptions=False)
        return done.exit_code, done.output

    def json(self, *words: str) -> Any:
        code, said = self.gateway(*words, "--json")
        assert code == 0, said
        return json.loads(said)

    def catalog(self, **sources: str) -> None:
        entries = {name: {"source": source, "memory_gib": 1} for name, source in sources.items()}
        (self.folder / "models.yaml").write_text(json.dumps({"models": entries}))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    repositories = {
        name: Repository({"config.json": CONFIG, "model.safetensors": name.encode() + CONTENT}, commit=commit)
        for name, commit in (("org/m", SHA), ("org/copy", SHA), ("org/old", OTHER))
    }
    repositories["org/gated"] = Repository(repositories["org/m"].files, gated=True)
    with serving(repositories) as hub:
        hub.here(monkeypatch, tmp_path / "hub")
        found = Place(tmp_path, hub)
        found.cache.mkdir()
        (tmp_path / "site.py").write_text(
            "from pathlib import Path\nfrom parsl.providers import LocalProvider\n"
            "from gateway_plugin.site import NodeType, Site\n"
            f"site = Site(name='s', weights_folder=Path({str(found.cache)!r}), node_types=(\n"
            "    NodeType(name='cpu', provider=LocalProvider(), cpus=2, engine_memory_gib=3),))\n"
        )
        found.catalog(m=f"org/m@{SHA}", loose="org/copy", local="/data/m", made="prepared:all-minilm-l6-v2")
        yield found


def test_an_entry_is_fetched_into_the_sites_folder(place: Place) -> None:
    code, said = place.gateway("fetch", "m", "org/old")
    assert code == 0, said
    folder = snapshot(place.cache, "org/m", SHA)
    assert re.search(rf"org/m@{SHA}: 5\.0 MiB in \d+ s: {folder}\n", said), said
    assert f"write 'org/old@{OTHER}' in the catalog" in said
    assert f"org/m@{SHA}: 5.0 MiB of 5.0 MiB" in said, "lines of progress, where there is no terminal"
    (found,) = place.json("fetch", "m")
    assert (found["fetched_bytes"], found["revision"], found["folder"]) == (0, SHA, str(folder))


def test_entries_whose_memory_is_worked_out_are_fetched_listed_and_kept(place: Place) -> None:
    entries = {"m": {"source": f"org/m@{SHA}", "memory_gib": "auto"}, "loose": {"source": "org/copy"}}
    (place.folder / "models.yaml").write_text(json.dumps({"models": entries}))
    assert place.gateway("fetch", "m", "loose", "org/old")[0] == 0
    assert [one["entries"] for one in place.json("weights")["weights"]] == [["loose"], ["m"], []]
    assert [one["repository"] for one in place.json("prune", "--yes")["removed"]] == ["org/old"]


def test_what_is_there_is_enough_where_the_hub_cannot_be_reached(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.gateway("fetch", "m")[0] == 0
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, said = place.gateway("fetch", "m")
    assert code == 0
    assert "cannot be asked for org/m" in said
    assert "What is there is whole" in said
    assert place.gateway("fetch", "loose")[0] == 69


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nothing", 66, "No catalog entry or recipe is called 'nothing', and a hub name is org/name."),
        ("local", 2, "'local' is the folder /data/m: there is nothing to fetch."),
        ("made", 2, "run `gateway models prepare all-minilm-l6-v2`"),
        ("org/none", 66, "check the name and the token"),
        ("qwen3-4b", 66, "Qwen/Qwen3-4B"),  # a recipe, and no model of this hub
        ("org/m@gone", 66, "has no revision 'gone'"),
        ("org/m@a b", 2, "'org/name@REVISION'"),
        ("org/gated", 69, "is gated: accept its licence"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(place: Place, name: str, code: int, words: str) -> None:
    exit_code, said = place.gateway("fetch", name)
    assert exit_code == code
    lines = said.splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]


def test_a_token_comes_from_a_file_and_is_nowhere_in_the_output(place: Place) -> None:
    token = place.folder / "token"
    token.write_text("hf_right\n")
    token.chmod(0o640)
    code, said = place.gateway("fetch", "org/gated", "--token-file", str(token))
    assert (code, "chmod 600" in said) == (2, True)
    token.chmod(0o600)
    code, said = place.gateway("fetch", "org/gated", "--token-file", str(token))
    assert code == 0, said
    assert "hf_right" not in said


def test_weights_are_listed_with_what_refers_to_them_and_the_rest_is_pruned(place: Place) -> None:
    assert place.gateway("fetch", "m", "loose", "org/old")[0] == 0
    listed = {one["repository"]: one for one in place.json("weights")["weights"]}
    assert {name: one["entries"] for name, one in listed.items()} == {
        "org/m": ["m"], "org/copy": ["loose"], "org/old": [],
    }  # fmt: skip
    assert listed["org/old"]["disk_bytes"] >= 5 * MIB
    assert listed["org/old"]["last_used"] > 0
    code, said = place.gateway("weights")
    assert code == 0
    assert ("3 in " in said, "15.0 MiB" in said, OTHER[:12] in said) == (True, True, True)
    code, said = place.gateway("prune", "--dry-run")
    assert (code, "org/old" in said, "org/m" in said) == (0, True, False)
    assert place.gateway("prune", given="n\n")[0] == 1
    assert snapshot(place.cache, "org/old") is not None, "it asks"
    code, said = place.gateway("prune", "--json")
    assert code == 2
    code, said = place.gateway("prune", given="y\n")
    assert (code, "5.0 MiB freed" in said) == (0, True), said
    assert snapshot(place.cache, "org/old", OTHER) is None
    assert snapshot(place.cache, "org/m", SHA) is not None
    assert place.json("prune", "--yes")["removed"] == []


@pytest.mark.parametrize(
    "engine",
    [{"model": "gone", "state": "draining", "stop_reason": None}, {"model": "m", "stop_reason": "catalog"}],
    ids=["removed", "changed"],
)
def test_what_an_engine_that_drains_was_started_from_is_not_pruned(place: Place, engine: dict[str, Any]) -> None:
    assert place.gateway("fetch", "m", "org/old")[0] == 0
    others = [{"model": "m", "stop_reason": None}, {"model": "m", "stop_reason": "idle"}]
    status = {"state": "ready", "models": [{"id": "m", "state": "ready"}], "engines": [*others, engine]}
    settled = {**status, "engines": others}
    with answering(place.folder / "state", **{"GET /gateway/v1/status": [status, {**settled, "state": "starting"}]}):
        code, said = place.gateway("prune", "--yes")
        assert (code, f"Engines of {engine['model']} still drain" in said) == (69, True), said
        code, said = place.gateway("prune", "--yes")
        assert (code, "does not know its engines yet" in said) == (69, True), said
        assert snapshot(place.cache, "org/old", OTHER) is not None
    with answering(place.folder / "state", **{"GET /gateway/v1/status": [settled]}):
        assert len(place.json("prune", "--yes")["removed"]) == 1


def test_weights_are_pruned_while_the_gateway_is_down(place: Place) -> None:
    assert place.gateway("fetch", "m", "org/old")[0] == 0
    with answering(place.folder / "state"):
        pass
    assert len(place.json("prune", "--yes")["removed"]) == 1


def test_what_would_be_pruned_is_said_while_an_engine_drains(place: Place) -> None:
    assert place.gateway("fetch", "m", "org/old")[0] == 0
    status = {"state": "ready", "models": [{"id": "m", "state": "ready"}], "engines": [{"model": "gone"}]}
    with answering(place.folder / "state", **{"GET /gateway/v1/status": [status]}):
        said = place.json("prune", "--dry-run")
    assert ([one["repository"] for one in said["removed"]], said["dry_run"]) == (["org/old"], True)


@pytest.mark.parametrize("where", ["here", "on another machine"])
def test_nothing_is_pruned_while_a_gateway_that_cannot_be_asked_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    assert place.gateway("fetch", "m", "org/old")[0] == 0
    with answering(place.folder / "state"):
        pass
    own = Mark(1, 2.0)
    if where == "here":
        monkeypatch.setattr("gateway_plugin.service.discovery.supervisors_of", lambda _: (own,))
    else:
        record = {"url": URL, "host": "login1", "supervisor": {"pid": 1, "started": 2.0}}
        (place.folder / "state/service.json").write_text(json.dumps(record))
    code, said = place.gateway("prune", "--yes")
    assert (code, ("does not run" if where == "here" else "runs on login1: run this command there") in said) == (
        69,
        True,
    )
    assert snapshot(place.cache, "org/old", OTHER) is not None


def test_a_copy_of_a_repository_with_the_same_commit_is_another_model(place: Place) -> None:
    assert place.gateway("fetch", "org/m", "org/copy")[0] == 0
    place.catalog(m=f"org/m@{SHA}")
    found = place.json("prune", "--yes")
    assert [one["repository"] for one in found["removed"]] == ["org/copy"]
    assert found["freed_bytes"] >= 5 * MIB
    assert snapshot(place.cache, "org/m", SHA) is not None


def test_prune_spares_what_may_be_needed(place: Place) -> None:
    hub_client = pytest.importorskip("huggingface_hub")
    assert place.gateway("fetch", "org/m", "org/copy", "org/old")[0] == 0
    entry = {
        "source": "/data/m",
        "memory_gib": 1,
        "aliases": ["x"],
        "args": ["--enable-lora", "--lora-modules", "x=org/copy"],
    }
    unknown = {"source": "org/m@v9", "memory_gib": 1}
    (place.folder / "models.yaml").write_text(json.dumps({"models": {"a": entry, "b": unknown}}))
    with fetch_lock(place.cache, "org/old") as lock:
        assert lock()
        assert place.json("prune", "--yes")["removed"] == []
        listed = place.json("weights")["weights"]
        assert [one["entries"] for one in listed] == [["a"], ["b"], []]
        assert [one["fetching"] for one in listed] == [False, False, True]
    place.catalog(m=f"org/m@{SHA}", c="org/copy")
    assert len(place.json("prune", "--yes")["removed"]) == 1
    hub_client.hf_hub_download("org/old", "model.safetensors", cache_dir=place.cache)
    assert place.json("prune", "--yes")["removed"] == [], "another program's"
    assert len(place.json("prune", "--yes", "--all")["removed"]) == 1
    (place.folder / "models.yaml").write_text('{"models": {}}')
    assert place.gateway("prune", "--yes")[0] == 2, "without a catalog everything would seem unused"


def test_prune_leaves_what_others_use(place: Place) -> None:
    hub_client = pytest.importorskip("huggingface_hub")
    assert place.gateway("fetch", "org/m", "org/copy", "org/old")[0] == 0
    place.catalog(m="org/other")
    colleagues = place.cache / "models--org--m" / ".gateway" / SHA
    if os.getuid() == 0:
        os.chown(colleagues, 4242, 4242)
    else:
        colleagues.unlink()
    elsewhere = place.folder / "elsewhere"  # a link into a colleague's cache
    (place.cache / "models--org--copy").rename(elsewhere)
    (place.cache / "models--org--copy").symlink_to(elsewhere)
    place.hub.repositories["org/old"].commit = SHA  # another program fetches a newer revision; the older one is damaged
    hub_client.hf_hub_download("org/old", "model.safetensors", cache_dir=place.cache)
    link = place.cache / "models--org--old" / "snapshots" / OTHER / "config.json"
    link.unlink()
    link.symlink_to("../../blobs/none")
    assert place.json("prune", "--yes")["removed"] == []
    code, said = place.gateway("prune", "--yes", "--all")
    assert (code, "models--org--copy is a link to" in said) == (69, True)
    assert snapshot(elsewhere.parent, "org/copy") is None
    assert (elsewhere / "snapshots" / SHA / "model.safetensors").is_file()


def test_an_entry_that_names_a_folder_in_the_cache_keeps_it(place: Place) -> None:
    assert place.gateway("fetch", "org/m", "org/copy", "org/old")[0] == 0
    inside = [place.cache / f"models--org--{name}" / "snapshots" / SHA for name in ("m", "copy")]
    (place.folder / "link").symlink_to(inside[0])
    local = {"source": str(place.folder / "link"), "memory_gib": 1}
    base = {"source": "org/base", "memory_gib": 1, "adapters": {"x": str(inside[1])}}
    (place.folder / "models.yaml").write_text(json.dumps({"models": {"local": local, "base": base}}))
    assert [one["entries"] for one in place.json("weights")["weights"]] == [["base"], ["local"], []]
    assert [one["repository"] for one in place.json("prune", "--yes")["removed"]] == ["org/old"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
def test_a_colleagues_folder_is_used_listed_and_not_written_to(place: Place) -> None:
    for words in (("fetch", "m"), ("weights",)):  # with all that is imported on the way
        assert place.gateway(*words)[0] == 0
    closed = {
        one: one.stat().st_mode for one in (place.folder, *place.folder.parents) if not one.stat().st_mode & 0o005
    }
    for folder, mode in closed.items():
        folder.chmod(mode | 0o055)
    before = sorted(place.cache.rglob("*"))
    os.setegid(65534)
    os.seteuid(65534)
    try:
        listed = place.gateway("weights")
        fetched = place.gateway("fetch", "m")
        refused = place.gateway("fetch", "loose")
    finally:
        os.seteuid(0)
        os.setegid(0)
        for folder, mode in closed.items():
            folder.chmod(mode)
    assert (listed[0], "org/m" in listed[1]) == (0, True), listed
    assert (fetched[0], "was there" in fetched[1]) == (0, True), fetched
    assert (refused[0], "cannot be written: Permission denied. Set weights_folder" in refused[1]) == (69, True), refused
    assert sorted(place.cache.rglob("*")) == before


@pytest.mark.process
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_an_interrupted_fetch_is_listed_and_continued(place: Place, how: signal.Signals) -> None:
    def kept() -> int:
        return sum(path.stat().st_size for path in place.cache.rglob("*.incomplete"))

    place.hub.chunk_s = 0.02
    words = [sys.executable, "-m", "gateway_plugin.cli.main", *place.words("fetch", "m")]
    environment = {**os.environ, **place.hub.environment(place.folder / "hub")}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert eventually(lambda: kept() >= MIB, 60)
        process.send_signal(how)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    (found,) = place.json("weights")["weights"]
    assert (found["lacks"], found["entries"], found["fetching"]) == ("there are no weights in it", ["m"], False)
    assert found["disk_bytes"] >= MIB
    place.hub.chunk_s = 0
    assert place.gateway("fetch", "m")[0] == 0
    assert sum(place.hub.sent.values()) < 7 * MIB


@pytest.mark.process
def test_a_bar_on_a_terminal_and_ctrl_c(place: Place) -> None:
    place.hub.chunk_s = 0.03
    environment = {**os.environ, **place.hub.environment(place.folder / "hub"), "TERM": "xterm", "COLUMNS": "160"}
    words = [sys.executable, "-m", "gateway_plugin.cli.main", *place.words("fetch", "m")]
    terminal = Terminal(words, environment)
    try:
        terminal.read_until(" of 5.0 MiB, ")
        terminal.read_until(" left")
        terminal.type("\x03")
        terminal.read_until("interrupted")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()


def test_words_of_a_transfer() -> None:
    assert [size(count) for count in (0, 1023, 1536, 3.2 * MIB, 15 << 30)] == [
        "0 B", "1023 B", "2 KiB", "3.2 MiB", "15.0 GiB",
    ]  # fmt: skip
    assert rate(deque()) is None
    assert rate(deque([(1.0, 5)])) is None
    assert rate(deque([(1.0, 5), (3.0, 25)])) == 10
    assert transfer_words(Progress(MIB, 3 * MIB), MIB / 2) == "1.0 MiB of 3.0 MiB, 512 KiB/s, 4 s left"
    assert transfer_words(Progress(MIB, 3 * MIB), None) == "1.0 MiB of 3.0 MiB"
    assert transfer_words(Progress(0, MIB, waits=True), 1.0) == "0 B of 1.0 MiB; waits for another fetch of it"
