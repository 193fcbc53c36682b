"""Where fetched weights lie, whether they are whole, and which files of a repository are fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError
from gateway_plugin.hub import cache_folder
from gateway_plugin.hub_cache import cache_of, commit_of, lacks, repository_folder, shown_for, snapshot
from gateway_plugin.weights import resolve
from gateway_plugin.weights_choice import chosen, quantizations

COMMIT = "ab" * 20
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def put(cache: Path, *names: str, commit: str = COMMIT, ref: str = "") -> Path:
    """A snapshot of ``org/m`` with these files, as the hub's client lays them out."""
    folder = repository_folder(cache, "org/m")
    for name in names:
        blob, link = folder / "blobs" / name.replace("/", "-"), folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"weight_map": {str(at): shard for at, shard in enumerate(SHARDS)}})
        blob.write_text(text if name.endswith("index.json") else "x")
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


def test_a_revision_is_a_commit_a_ref_or_the_beginning_of_a_commit(tmp_path: Path) -> None:
    folder = put(tmp_path, "model.safetensors", ref="v1")
    for revision in (COMMIT, COMMIT[:8], "v1"):
        assert snapshot(tmp_path, "org/m", revision) == folder
    for revision in ("", "main", "v2", "ba" * 20, "ababa", "../../../etc/passwd"):
        assert snapshot(tmp_path, "org/m", revision) is None
    put(tmp_path, "model.safetensors", commit=COMMIT[:8] + "c" * 32, ref="main")
    assert commit_of(tmp_path, "org/m", COMMIT[:8]) == "", "two commits begin so"
    assert commit_of(tmp_path, "org/m").endswith("ccc")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("config.json",), "there are no weights in it"),
        (("config.json", "model.safetensors"), ""),
        (("config.json", "m-Q4.gguf"), ""),
        (("model.safetensors.index.json", SHARDS[0]), "1 of the 2 files"),
        (("model.safetensors.index.json", *SHARDS), ""),
        (("model.safetensors.index.json", "consolidated.safetensors"), ""),
        (("model_index.json", "unet/model.safetensors.index.json", "unet/" + SHARDS[0]), "1 of the 2 files"),
        (("model_index.json", "unet/model.safetensors.index.json", *("unet/" + one for one in SHARDS)), ""),
    ],
)
def test_a_snapshot_is_whole_or_says_what_it_lacks(tmp_path: Path, names: tuple[str, ...], missing: str) -> None:
    assert missing in lacks(put(tmp_path, *names))
    assert bool(lacks(put(tmp_path / "other", *names))) == bool(missing)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*words: object) -> Path | None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gateway_plugin.weights.snapshot", closed)
    with pytest.raises(ConfigError, match=rf"cannot be read in {tmp_path} \(Permission denied\)"):
        resolve(Model(name="m", source=f"org/m@{COMMIT}", memory_gib=1), fetched=tmp_path)


def test_odd_snapshots(tmp_path: Path) -> None:
    folder = put(tmp_path, "model.safetensors", "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").resolve().write_text('{"weight_map": [1]}')
    assert "cannot be read" in lacks(folder)
    (folder / "model.safetensors").resolve().unlink()
    assert lacks(folder) == "the content of model.safetensors is gone"


def test_an_entrys_fetched_weights_are_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, own = tmp_path / "shared", tmp_path / "own"
    monkeypatch.setenv("HF_HUB_CACHE", str(own))
    entry = Model(name="m", source=f"org/m@{COMMIT}", memory_gib=1)
    with pytest.raises(ConfigError, match=rf"org/m@{COMMIT} are not in {place}; run `gateway models fetch m`"):
        resolve(entry, fetched=place)
    put(place, "config.json")
    with pytest.raises(ConfigError, match=rf"are not whole in {place} \(there are no weights in it\); run `gateway"):
        resolve(entry, fetched=place)
    there = put(own, "model.safetensors")
    assert resolve(entry, fetched=place) == str(there), "the hub's own cache, too"
    assert shown_for(str(there)) == own / "models--org--m"
    assert shown_for(str(there / "model.safetensors")) == own / "models--org--m"
    assert (cache_of(str(there)), cache_of(str(there / "x" / "m.gguf"))) == (own, own)
    assert shown_for("/data/m") == Path("/data/m")
    assert cache_of("/data/m") is None
    assert cache_of("org/m@v1") is None
    assert resolve(entry) == entry.source


@pytest.mark.process
@pytest.mark.parametrize(
    "names",
    [{}, {"HF_HOME": "/h"}, {"XDG_CACHE_HOME": "/x"}, {"HF_HUB_CACHE": "$HOME/c"}, {"HUGGINGFACE_HUB_CACHE": "/o"}],
    ids=lambda names: next(iter(names), "none"),
)
def test_the_cache_is_where_the_hubs_client_has_it(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home-of-a-test", **names}.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(cache_folder()) == done.stdout.strip()
    assert cache_folder(Path("/w")) == Path("/w")


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        # Llama 3: its authors' own layout in a folder
        ("config.json model-00001.safetensors original/consolidated.00.pth original/params.json",
         "original/consolidated.00.pth original/params.json"),
        # Mistral: both layouts at the top; one of its models has the consolidated one alone
        ("model-00001.safetensors consolidated.safetensors params.json", "consolidated.safetensors"),
        ("consolidated.safetensors params.json", ""),
        # BERT: the same weights for five frameworks
        ("model.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot onnx/model.onnx",
         "pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot onnx/model.onnx"),
        ("pytorch_model.bin tf_model.h5", "tf_model.h5"),
        # sentence-transformers: a second module has only pickles
        ("model.safetensors pytorch_model.bin 2_Dense/pytorch_model.bin 1_Pooling/config.json", "pytorch_model.bin"),
        # gpt-oss
        ("model-00001.safetensors metal/model.bin original/model.safetensors",
         "metal/model.bin original/model.safetensors"),
        # a pipeline; faster-whisper; GGUF alone, and beside safetensors
        ("model_index.json unet/model.safetensors unet/model.bin vae/model.safetensors", "unet/model.bin"),
        ("model.bin vocabulary.txt", ""),
        ("m-Q4.gguf m-Q8.gguf", ""),
        ("model.safetensors m-Q4.gguf", "m-Q4.gguf"),
        ("original/model.safetensors config.json", ""),
    ],
)  # fmt: skip
def test_second_copies_are_left_out(files: str, left_out: str) -> None:
    assert set(files.split()) - set(chosen(files.split())) == set(left_out.split())


def test_quantizations_are_counted_whole() -> None:
    files = ("m-Q4.gguf", "q8/m-Q8-00001-of-00002.gguf", "q8/m-Q8-00002-of-00002.gguf", "mmproj-f16.gguf", "x.json")
    assert quantizations(files) == ("m-Q4.gguf", "q8/m-Q8-00001-of-00002.gguf")


def test_patterns() -> None:
    files = ("a.gguf", "b.gguf", "model.safetensors", "docs/x.md")
    assert chosen(files, include=("b.*",)) == ("b.gguf",)
    assert chosen(files, exclude=("docs/",)) == ("model.safetensors",)
    assert chosen(files, exclude=("*.md",), include=("*",)) == ("a.gguf", "b.gguf", "model.safetensors")
