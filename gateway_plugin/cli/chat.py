"""``gateway chat`` and ``gateway embed``: use a model from the shell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gateway_plugin.api_types import chat_words, raise_if_nothing_said
from gateway_plugin.cli.connection import connect
from gateway_plugin.cli.output import Answer, json_option, put, read_terminal, report_error, settings, show
from gateway_plugin.cli.waiting import Waiting
from gateway_plugin.errors import InvalidRequest, NothingSaid

if TYPE_CHECKING:
    from gateway_plugin.client import Client

Messages = list[dict[str, str]]
_endpoint = click.option(
    "--endpoint", metavar="ID", help="Through Globus Compute and this endpoint; the function: $GATEWAY_FUNCTION."
)


@click.command()
@click.argument("model")
@click.argument("prompt", nargs=-1)
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens of an answer at most.")
@click.option("--temperature", type=click.FloatRange(0, 2))
@_endpoint
@json_option
def chat(
    model: str,
    prompt: tuple[str, ...],
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    endpoint: str | None,
) -> None:
    """Ask a model. Without PROMPT: stdin, or a conversation on a terminal. The answer is streamed, unless it comes
    through Globus Compute.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    messages: Messages = [{"role": "system", "content": system}] if system else []
    with _remote(endpoint, model, options) if endpoint else _local(model, options) as ask:
        if prompt or not read_terminal():
            text = " ".join(prompt) if prompt else sys.stdin.read().strip()
            if not text:
                raise InvalidRequest("There is nothing to ask: give a prompt, or pipe one in.")
            messages.append({"role": "user", "content": text})
            ask(messages)
            return
        put("Ctrl-D ends.", err=True)
        while (line := _read_line()) is not None:
            if line.strip():
                asked = [*messages, {"role": "user", "content": line}]
                try:
                    messages = [*asked, {"role": "assistant", "content": ask(asked)}]
                except NothingSaid as error:  # the conversation goes on without this question
                    report_error(error, as_json=False)


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        put("")
        return None


@contextmanager
def _local(model: str, options: dict[str, Any]) -> Iterator[Callable[[Messages], str]]:
    with connect() as client:
        yield lambda messages: _ask(client, model, messages, options)


@contextmanager
def _remote(endpoint: str, model: str, options: dict[str, Any]) -> Iterator[Callable[[Messages], str]]:
    from gateway_plugin.globus import GlobusClient

    def ask(messages: Messages) -> str:
        answer = client.submit("/v1/chat/completions", {"model": model, "messages": messages, **options}).result()
        return _show(answer, _put)

    with GlobusClient(endpoint) as client:
        yield ask


def _show(answer: dict[str, Any], put_words: Callable[[str], None]) -> str:
    """With ``--json`` the whole answer, which says by itself how it ended; else its words. Raises ``NothingSaid``."""
    if settings().json:
        show(answer, lambda: None)
        return str(answer["choices"][0]["message"].get("content") or "")
    content = chat_words(answer["choices"][0])
    put_words(content)
    return content


def _put(content: str) -> None:
    shown = Answer()
    shown.write(content)
    shown.end()


def _ask(client: Client, model: str, messages: Messages, options: dict[str, Any]) -> str:
    create: Any = client.openai.chat.completions.create  # its overloads want typed dictionaries of every role
    if settings().json:
        return _show(create(model=model, messages=messages, **options).model_dump(exclude_none=True), _put)
    words: list[str] = []
    thought, called, ended = False, False, None
    shown = Answer()
    with Waiting(client, model) as waiting:
        for chunk in create(model=model, messages=messages, stream=True, **options):
            waiting.end()
            for choice in chunk.choices:
                ended = choice.finish_reason or ended
                extra = choice.delta.model_extra or {}
                thought = thought or bool(extra.get("reasoning") or extra.get("reasoning_content"))
                called = called or bool(choice.delta.tool_calls or choice.delta.function_call)
                if choice.delta.content:
                    words.append(choice.delta.content)
                    shown.write(choice.delta.content)
    if not called:
        raise_if_nothing_said("".join(words), thought, ended)
    shown.end()
    return "".join(words)


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1)
@_endpoint
@json_option
def embed(model: str, texts: tuple[str, ...], endpoint: str | None) -> None:
    """Print the vector of every text (arguments, or the lines of stdin) as JSON, one line each."""
    import json

    chosen = list(texts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not chosen:
        raise InvalidRequest("There is nothing to embed: give texts, or pipe them in, one a line.")
    vectors = _vectors_through(endpoint, model, chosen) if endpoint else _vectors(model, chosen)
    document = {"model": model, "data": [{"text": t, "embedding": v} for t, v in zip(chosen, vectors, strict=True)]}
    show(document, lambda: put("\n".join(json.dumps(vector) for vector in vectors)))


def _vectors(model: str, texts: list[str]) -> list[list[float]]:
    with connect() as client:
        answer = client.openai.embeddings.create(model=model, input=texts, encoding_format="float")
    return [entry.embedding for entry in answer.data]


def _vectors_through(endpoint: str, model: str, texts: list[str]) -> list[list[float]]:
    from gateway_plugin.globus import GlobusClient

    with GlobusClient(endpoint) as client:
        return client.embed(texts, model)
