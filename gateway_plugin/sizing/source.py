"""Reads what ``plan`` needs: from a folder, or from the hub (metadata only, no weights)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway_plugin import hub
from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError, NotFound
from gateway_plugin.sizing.architecture import UnknownArchitecture, parse_config
from gateway_plugin.sizing.plan import Source
from gateway_plugin.weights import is_local, resolve, split_revision

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_CONFIG_MAX = 4 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt")
"""Kinds of weights' files, the preferred first: of a repository with several kinds, engines load one."""


def read_source(name: str, token_file: Path | None = None) -> Source:
    """The sizes of the model at ``name``: ``org/name``, ``org/name@REVISION``, a folder, or ``prepared:NAME``.

    Args:
        token_file: holds the hub's token; else ``HF_TOKEN`` or the hub's own login is used.

    Raises:
        ConfigError: ``name`` is malformed, or the configuration does not say enough for an estimate.
        NotFound: the hub has no such model or revision, or there is no such folder.
        ServiceError: the hub cannot be reached, or refuses.
    """
    if not is_local(hub.hub_source(name)):
        return _from_hub(name, token_file)
    entry = Model(name="model", source=name, memory_gib=1)
    try:
        folder = Path(resolve(entry))
    except ConfigError as error:  # it names the key of an entry, and there is none yet
        raise ConfigError(error.message.removeprefix(f"models.{entry.name}.source: ")) from None
    return _from_folder(name, folder)


def _from_folder(name: str, folder: Path) -> Source:
    try:
        config = json.loads((folder / "config.json").read_bytes()[:_CONFIG_MAX])
    except FileNotFoundError:
        files = tuple(path.name for path in folder.iterdir())
        raise NotFound(f"{folder}: has no config.json; {_instead(files)}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return _source(name, config, sizes)


def _from_hub(name: str, token_file: Path | None) -> Source:
    repository, revision = split_revision(name)
    token = hub.token(token_file)
    found = hub.model_info(repository, revision, token)
    files = tuple(file.rfilename for file in found.siblings or ())
    if files and "config.json" not in files:
        raise ConfigError(f"{repository}: has no config.json; {_instead(files)}.")
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    if sizes.get("config.json", 0) > _CONFIG_MAX:
        raise ConfigError(f"{repository}: its config.json has {sizes['config.json']} bytes, which is none of a model.")
    with hub.asking(repository, revision):
        from huggingface_hub import errors, hf_hub_download

        try:
            path = hf_hub_download(
                repository, "config.json", revision=found.sha, token=token, etag_timeout=hub.TIMEOUT_S
            )
        except errors.RemoteEntryNotFoundError:
            raise ConfigError(f"{repository}: has no config.json; {_instead(files)}.") from None
    try:
        config = json.loads(Path(path).read_bytes()[:_CONFIG_MAX])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{repository}: its config.json is not JSON: {error}") from None
    return _source(repository, config, sizes, found)


def _instead(files: tuple[str, ...]) -> str:
    """What to do with a model of these files, without a ``config.json``."""
    if "adapter_config.json" in files:
        return "it is an adapter: plan its base, and name the adapter in the entry's args (--lora-modules)"
    if any(file.endswith(".gguf") for file in files):
        return "of GGUF files no memory can be worked out: write the entry by hand, with 'memory_gib'"
    return "expected a model as Transformers saves it; else write the entry by hand, with 'memory_gib'"


def _source(name: str, config: object, sizes: dict[str, int], info: ModelInfo | None = None) -> Source:
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: its config.json is not a mapping; give 'memory_gib' yourself.")
    if any(file.endswith(".gguf") for file in sizes) and not _weights_bytes(sizes):
        raise ConfigError(f"{name}: {_instead(tuple(sizes))}.")
    try:
        architecture = parse_config(config)
    except UnknownArchitecture as missing:
        raise ConfigError(f"{name}: no estimate: {missing}; give 'memory_gib' yourself.") from None
    total = _weights_bytes(sizes)
    if info is None:
        return Source(name, architecture, total)
    return Source(name, architecture, total, info.sha or "", _license(info.card_data), bool(info.gated))


def _weights_bytes(sizes: dict[str, int]) -> int:
    """Size of the files that an engine loads: those of the preferred kind, without a second copy in another layout."""
    for kind in _WEIGHTS:
        found = {file: size for file, size in sizes.items() if file.endswith(kind) and "/" not in file}
        copies = {file for file in found if file.startswith("consolidated")}
        if found:
            return sum(size for file, size in found.items() if file not in copies or copies == found.keys())
    return 0


def _license(card: Any) -> str:
    found = card.get("license") if card is not None else None
    return " ".join(found.split())[:80] if isinstance(found, str) else ""
