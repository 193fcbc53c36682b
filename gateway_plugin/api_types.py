"""What the gateway's own routes answer, parsed: values for what is well, a ``GatewayError`` for what is not.

A client may be older than the gateway that it talks to, so keys that it does not know are left alone here. (Files that
people write are another matter: there an unknown key is refused.)
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway_plugin.errors import (
    BodyTooLarge,
    Forbidden,
    GatewayError,
    InvalidKey,
    InvalidRequest,
    NotFound,
    NothingSaid,
    TaskFailed,
)

READY = "ready"
FAILED = "failed"

Prompt = str | Sequence[Mapping[str, Any]]
"""A prompt, or messages in OpenAI's form."""


@dataclass(frozen=True)
class ModelInfo:
    """One model of the catalog and how it is."""

    name: str
    task: str
    """``generate`` or ``embed``."""
    state: str
    """``cold``, ``fetching``, ``loading``, ``ready``, ``stalled``, ``draining``, ``failed`` or ``queued``."""
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    """LoRA adapters that its engines serve, under names of their own."""
    eta_s: float | None = None
    """Seconds until it is expected to be ready, where that can be said."""
    pinned: bool = False
    in_flight: int = 0
    """Requests that its engines work on."""
    waiting: int = 0
    """Requests that wait for it."""
    nodes: tuple[str, ...] = ()
    reason: str | None = None
    """Why it is not ready: how its engine failed, with its last output for administrators, or what it is queued for."""
    gpus: int | None = None
    memory_gib: float | None = None
    """What is planned with, of each GPU or of the node's engine memory. This and what follows: for administrators."""
    predicted_gib: float | None = None
    """What was worked out, where the catalog leaves it to the gateway."""
    measured_gib: float | None = None
    """The most that an engine of it was seen to hold."""
    cache_tokens: int | None = None
    """Tokens that its engine's cache of keys and values has room for."""
    load_s: float | None = None
    """Seconds of its last load."""

    @property
    def ready(self) -> bool:
        """Whether a request now is answered without a load."""
        return self.state == READY


@dataclass(frozen=True)
class Status:
    """The gateway as a whole; or a Globus Compute endpoint, of which ``state`` and ``document`` alone are known."""

    state: str
    """``ready``, or ``starting`` until it knows what its agents and its edge have. Of an endpoint: ``online``,
    ``offline``, or another word of the service's."""
    models: tuple[ModelInfo, ...]
    engines: tuple[Mapping[str, Any], ...]
    """``id model node state route in_flight age_s address`` and more; see docs/http.md."""
    nodes: tuple[Mapping[str, Any], ...]
    """``id type phase block host_mib gpu_mib free_mib age_s`` and more."""
    waiting: int
    switches: int
    """Engines evicted so that another model could be loaded, since the controller began."""
    document: Mapping[str, Any] = field(repr=False, default_factory=dict)
    """The whole answer, as it came."""

    @property
    def online(self) -> bool:
        """Whether requests are answered now. Those for an offline endpoint wait for it, up to two weeks."""
        return self.state in (READY, "online")

    @property
    def details(self) -> Mapping[str, Any]:
        """Of an endpoint: its last report, as it came; of a gateway: empty."""
        found = self.document.get("details")
        return found if isinstance(found, Mapping) else {}

    def model(self, name: str) -> ModelInfo | None:
        """The model with this name, alias or adapter."""
        return next((one for one in self.models if name in (one.name, *one.aliases, *one.adapters)), None)


@dataclass(frozen=True)
class Why:
    """Why a model is as it is, for administrators."""

    model: str
    state: str
    why: tuple[str, ...]
    """Sentences."""
    would_change: tuple[str, ...]
    """Sentences: what would end or change this."""
    decisions: tuple[Mapping[str, Any], ...] = ()
    """The last ones, the latest first: ``ago_s action model engine other because``."""


def parse_why(answer: Mapping[str, Any]) -> Why:
    """The answer of ``GET /gateway/v1/models/why``."""
    return Why(
        model=answer["model"],
        state=answer["state"],
        why=tuple(answer.get("why", ())),
        would_change=tuple(answer.get("would_change", ())),
        decisions=tuple(answer.get("decisions", ())),
    )


MEASURED = ("gpus", "memory_gib", "predicted_gib", "measured_gib", "cache_tokens", "load_s")
"""Fields for administrators, where they are known."""


def parse_model(entry: Mapping[str, Any]) -> ModelInfo:
    """One entry of ``GET /v1/models``, also of one that stands under an alias."""
    return ModelInfo(
        name=entry.get("root") or entry["id"],
        task=entry.get("task", "generate"),
        state=entry.get("state", READY),
        aliases=tuple(entry.get("aliases") or ()),
        adapters=tuple(entry.get("adapters") or ()),
        eta_s=entry.get("eta_s"),
        pinned=bool(entry.get("pinned")),
        in_flight=int(entry.get("in_flight") or 0),
        waiting=int(entry.get("waiting") or 0),
        nodes=tuple(entry.get("nodes") or ()),
        reason=entry.get("reason"),
        **{name: entry.get(name) for name in MEASURED},
    )


def parse_models(answer: Mapping[str, Any]) -> list[ModelInfo]:
    """The answer of ``GET /v1/models``: each model once, without its aliases."""
    return [parse_model(entry) for entry in answer["data"] if entry.get("root", entry["id"]) == entry["id"]]


def parse_status(document: Mapping[str, Any]) -> Status:
    """The answer of ``GET /gateway/v1/status``."""
    return Status(
        state=document["state"],
        models=tuple(parse_model(entry) for entry in document.get("models", ())),
        engines=tuple(document.get("engines", ())),
        nodes=tuple(document.get("nodes", ())),
        waiting=int(document.get("waiting", 0)),
        switches=int(document.get("switches", 0)),
        document=document,
    )


def chat_text(answer: Mapping[str, Any]) -> str:
    """The text of a chat completion's first choice.

    Raises:
        NothingSaid: it has no text and no call of a tool, and ended at ``max_tokens`` or after thoughts alone. An empty
            text would pass for an answer, and be found after thousands of rows.
    """
    choice = answer["choices"][0]
    message = choice["message"]
    words: str = message.get("content") or ""
    if message.get("tool_calls") or message.get("function_call"):
        return words
    thought = message.get("reasoning") or message.get("reasoning_content")
    raise_if_nothing_said(words, bool(thought), choice.get("finish_reason"))
    return words


def raise_if_nothing_said(words: str, thought: bool, ended: str | None) -> None:
    """Raises ``NothingSaid``. ``thought``: it had begun to think; ``ended``: its ``finish_reason``."""
    if words.strip() or not (thought or ended == "length"):
        return
    if ended == "length":
        when = "while the model was thinking" if thought else "before the model said anything"
        raise NothingSaid(f"The answer ended at max_tokens {when}: raise max_tokens, or have it think less.")
    raise NothingSaid(
        "The model thought and then said nothing: have it think less, or see whether --reasoning-parser fits the model."
    )


def chat_body(prompt: Prompt, model: str, system: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion's request; ``options`` as ``split_options`` leaves them."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(part) for part in prompt]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return {"model": model, "messages": messages, **options}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What of a call's options is the request's body, ``extra_body`` merged into it as ``openai`` does; and its headers
    (``extra_headers``), which may be credentials and are no business of an engine's. Raises ``InvalidRequest``.
    """
    body = dict(options)
    extra, headers, query = (body.pop(f"extra_{kind}", None) or {} for kind in ("body", "headers", "query"))
    if query:
        raise InvalidRequest("extra_query: the gateway's paths take no query; put options into extra_body.")
    for name, value in headers.items():
        if not all(isinstance(part, str) and part.isascii() and part.isprintable() for part in (name, value)):
            raise InvalidRequest(f"extra_headers: {name!r}: expected a name and a value of printable ASCII.")
    return {**body, **extra}, {name.lower(): value for name, value in headers.items()}


def vectors(answer: Mapping[str, Any]) -> list[list[float]]:
    """The vectors of an embeddings answer in the texts' order, whether they came as base64 or as numbers."""
    return [_vector(entry["embedding"]) for entry in sorted(answer["data"], key=lambda entry: entry["index"])]


def _vector(given: str | list[float]) -> list[float]:
    if not isinstance(given, str):
        return [float(number) for number in given]
    data = base64.b64decode(given, validate=True)
    if len(data) % 4:
        raise ValueError(f"a vector of {len(data)} bytes")
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer as it came."""
    return answer


def reading(answer: dict[str, Any]) -> Any:
    """An answer read by its kind: the text of a chat or completion, vectors, else the answer as it came."""
    kind = answer.get("object")
    if kind == "chat.completion":
        return chat_text(answer)
    if kind == "text_completion":
        return answer["choices"][0]["text"] or ""
    if kind == "list" and any("embedding" in entry for entry in answer.get("data", ())):
        return vectors(answer)
    return answer


def understood(read: Callable[[dict[str, Any]], Any], answer: dict[str, Any]) -> Any:
    """What ``read`` finds in the answer, or the error why it finds nothing (``NothingSaid``, ``TaskFailed``)."""
    try:
        return read(answer)
    except GatewayError as error:
        return error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        words = str(error)[:200]
        return TaskFailed(f"The answer has another form than expected ({type(error).__name__}: {words}).")


_BY_STATUS: Mapping[int, type[GatewayError]] = {
    400: InvalidRequest,
    401: InvalidKey,
    403: Forbidden,
    404: NotFound,
    413: BodyTooLarge,
    422: InvalidRequest,
}
_TRY_LATER = frozenset({408, 429, 502, 503, 504})
_TRY_LATER_EXIT = 75


def parse_error(status: int, body: object, headers: Mapping[str, str]) -> GatewayError:
    """The error in an answer: by its code where that is one of these classes, else by its status.

    A code without a class here (the edge's own, or an engine's) is kept as the error's ``code``.

    ``body`` is parsed JSON in OpenAI's form, or anything else (then the status alone speaks).
    """
    said = body.get("error") if isinstance(body, Mapping) else None
    said = said if isinstance(said, Mapping) else {}
    message = said.get("message")
    code = said.get("code")
    cls = _BY_CODE.get(code if isinstance(code, str) else "") or _BY_STATUS.get(status, GatewayError)
    error = cls.__new__(cls)  # each class has its own arguments; the message was made with them already
    GatewayError.__init__(
        error,
        message if isinstance(message, str) and message else f"The gateway answered with HTTP status {status}.",
        retry_after_s=_seconds(headers.get("retry-after")),
        state=said.get("state") if isinstance(said.get("state"), str) else None,
        eta_s=_seconds(said.get("eta_s")),
        reason=said.get("reason") if isinstance(said.get("reason"), str) else None,
        position=said.get("position") if isinstance(said.get("position"), int) else None,
    )
    if error.status != status:
        error.status = status
    if isinstance(code, str) and code != error.code:
        error.code = code
    if cls is GatewayError and status in _TRY_LATER:
        error.exit_code = _TRY_LATER_EXIT
    return error


def _seconds(value: object) -> float | None:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None  # no such header, or a date: then nothing is known
    return seconds if math.isfinite(seconds) else None


def _family(cls: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)


_BY_CODE: Mapping[str, type[GatewayError]] = {cls.code: cls for cls in _family(GatewayError)}
