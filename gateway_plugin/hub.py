"""The hub as a whole: its client, tokens, and what its refusals mean. For ``sizing`` and ``fetching``.

A token comes from a file, else the client takes it from ``HF_TOKEN`` or the hub's own login
(huggingface.co/docs/huggingface_hub/package_reference/environment_variables). It is never part of a message.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import ValidationError

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError, GatewayError, NotFound, ServiceError
from gateway_plugin.files import NO_ROOM

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT_S = 20.0
_WORDS_MAX = 200
_ANSWER_MAX = 32 << 20
"""Bytes; that on a repository of 20,000 files has some 8 MiB."""
_FILES_MAX = 20_000
_NAME_MAX = 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables that hold the hub's token."""


def token(file: Path | None) -> str | None:
    """The token in ``file``; ``None``: the client looks in its own places.

    Raises:
        ConfigError: the file cannot be read, others can read it, or it holds no token.
    """
    if file is None:
        return None
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file}: others can read this token; run: chmod 600 {file}")
        found = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{file}: cannot be read: {said}") from None
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise ConfigError(f"{file}: expected the hub's token alone, on one line")
    return found


def model_info(repository: str, revision: str, with_token: str | None) -> ModelInfo:
    """What the hub knows of a repository: its files with sizes and hashes, the commit of ``revision``, its licence.

    Raises:
        NotFound: there is no such repository or revision.
        ServiceError: the hub cannot be reached, or refuses; its answer is none of a hub; its client is missing.
    """
    with asking(repository, revision):
        from huggingface_hub import constants
        from huggingface_hub.hf_api import ModelInfo

        said = _metadata(repository, revision, with_token)
        try:
            found = ModelInfo(**json.loads(said))  # type: ignore[no-untyped-call]
            wrong = _wrong(found)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            wrong = f"it is not what a hub says ({type(error).__name__})"
    if wrong:
        raise ServiceError(
            f"The answer about {repository} cannot be used: {wrong}. Is {constants.ENDPOINT} a hub, and is no proxy's "
            "page in between?"
        )
    return found


def _metadata(repository: str, revision: str, with_token: str | None) -> bytes:
    """The hub's answer about a repository. Not by ``HfApi.model_info``, which reads one of any size."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
        validate_repo_id,
    )

    validate_repo_id(repository)
    url = f"{constants.ENDPOINT}/api/models/{repository}"
    url += f"/revision/{quote(revision, safe='')}" if revision else ""
    headers = build_hf_headers(token=with_token) | {"Accept-Encoding": "identity"}
    with get_session().stream("GET", url, params={"blobs": True}, headers=headers, timeout=TIMEOUT_S) as response:
        said = whole(response, repository)
        hf_raise_for_status(response)
    return said


def whole(response: Any, repository: str) -> bytes:
    """The body of an answer that is no file's content, as it came: not unpacked.

    Raises:
        ServiceError: it is larger than any hub's.
    """
    said = bytearray()
    for piece in response.iter_raw():
        said += piece
        if len(said) > _ANSWER_MAX:
            raise ServiceError(
                f"The answer about {repository} has more than {_ANSWER_MAX >> 20} MiB, which none of a hub has: look "
                f"at what answers at {response.url.copy_with(query=None)} (HF_ENDPOINT, a proxy)."
            )
    return bytes(said)


def _wrong(found: ModelInfo) -> str:
    """What cannot be right in the hub's list of files; ``""``: nothing. Names and hashes of files become paths here."""
    files = found.siblings or ()
    if len(files) > _FILES_MAX:
        return f"it names {len(files)} files"
    for file in files:
        name, size = file.rfilename, file.size
        sha256 = file.lfs.sha256 if file.lfs is not None else None
        if not isinstance(name, str) or not name.isprintable() or "\\" in name or len(name) > _NAME_MAX:
            return f"a file's name is {ascii(name)[:80]}"
        if any(part in ("", ".", "..") for part in name.split("/")):
            return f"the file {name[:80]!r} leads out of its folder"
        if size is not None and not (isinstance(size, int) and size >= 0):
            return f"the size of {name} is {ascii(size)[:40]}"
        if sha256 and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            return f"the hash of {name} is {ascii(sha256)[:80]}"
    return ""


@contextmanager
def asking(repository: str, revision: str = "") -> Iterator[None]:
    """Turn the client's errors into one line each, with what to do; a file that is missing stays the client's error.

    Raises:
        ConfigError: ``repository`` cannot be a name on the hub.
        NotFound: the hub has no such repository or revision.
        ServiceError: the hub cannot be reached, or refuses; a disk is full; the client is missing.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise ServiceError("The hub's client is missing. Run: pip install 'gateway-plugin[serve]'") from None
    try:
        yield
    except GatewayError:
        raise
    except errors.GatedRepoError:
        raise ServiceError(
            f"{repository} is gated: accept its licence on the hub, then give a token of that account (HF_TOKEN, "
            "`hf auth login`, or --token-file)."
        ) from None
    except errors.RevisionNotFoundError:
        raise NotFound(f"{repository} has no revision '{revision}'. Its owner may have removed it.") from None
    except errors.RepositoryNotFoundError:
        raise NotFound(
            f"The hub has no model '{repository}', or it is private: check the name and the token."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise ServiceError(
            f"The hub cannot be asked for {repository}: HF_HUB_OFFLINE is set here; unset it and try again."
        ) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{repository!r} is no name of a model on the hub: {_words(error)}") from None
    except errors.RemoteEntryNotFoundError:
        raise
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # refused, unreachable
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = error.filename or "the weights folder"
            raise ServiceError(
                f"{where} cannot be written: {error.strerror}. Make room there, then run it again."
            ) from None
        root = _root(error)
        status = getattr(getattr(root, "response", None), "status_code", None)
        if status in (401, 403):
            raise ServiceError(
                f"The hub refuses {repository} ({status}): give a token that may read it (HF_TOKEN, `hf auth login`, "
                "or --token-file)."
            ) from None
        raise ServiceError(f"The hub cannot be asked for {repository}: {_words(root)} ({constants.ENDPOINT})") from None


def _root(error: BaseException) -> BaseException:
    """The first cause: the client wraps 'connection refused' into a text of several lines that advises only itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _words(error: BaseException) -> str:
    """One short line. An address may carry a signature that gives access for a while: it ends before the query."""
    said = " ".join(part.partition("?")[0] if "://" in part else part for part in str(error).split())
    return (said or type(error).__name__)[:_WORDS_MAX]


def cache_folder(configured: Path | None = None) -> Path:
    """Where fetched weights lie: ``Site.weights_folder``, else the hub's own cache, as its client finds it.

    The client need not be installed: nodes look here, too.
    """
    if configured is not None:
        return configured
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(found)).expanduser().absolute()


def quiet() -> None:
    """Have the client log errors alone: its warnings name addresses with signatures, and advise on its own commands."""
    import huggingface_hub.utils  # noqa: F401 - sets a level of its own

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def hub_source(source: str) -> str:
    """``source``, if it is ``org/name`` or ``org/name@REVISION``. Raises ``ConfigError``."""
    try:
        return Model(name="model", source=source, memory_gib=1).source
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
