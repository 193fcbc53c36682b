"""``gateway chat`` and ``gateway embed``: use a model from the shell."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gateway_plugin.api_types import chat_text, raise_if_nothing_said
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
    with connect(endpoint) as client:
        ask = partial(_ask, client, model, options)
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


def _ask(client: Client, model: str, options: dict[str, Any], messages: Messages) -> str:
    """Print the answer, and return its text. Raises ``NothingSaid``; with ``--json`` the answer says that itself."""
    if client.streams and not settings().json:
        return _stream(client, model, options, messages)
    answer = client.submit("/v1/chat/completions", {"model": model, "messages": messages, **options}).result()
    if settings().json:
        show(_without_nulls(answer), lambda: None)
        return str(answer["choices"][0]["message"].get("content") or "")
    content = chat_text(answer)
    shown = Answer()
    shown.write(content)
    shown.end()
    return content


def _without_nulls(found: Any) -> Any:
    """The answer's JSON without the keys that say nothing: engines send a null for every field of the API."""
    if isinstance(found, dict):
        return {name: _without_nulls(value) for name, value in found.items() if value is not None}
    return [_without_nulls(value) for value in found] if isinstance(found, list) else found


def _stream(client: Client, model: str, options: dict[str, Any], messages: Messages) -> str:
    from openai import OpenAIError

    create: Any = client.openai.chat.completions.create  # its overloads want typed dictionaries of every role
    words: list[str] = []
    thought, called, ended = False, False, None
    shown = Answer()
    try:
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
    except OpenAIError as error:
        raise client.error_of(error) from error
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
    with connect(endpoint) as client:
        # As numbers, not base64: 0.1 is printed as the engine wrote it, not as 0.10000000149011612.
        vectors = client.embed(chosen, model, encoding_format="float")
    document = {"model": model, "data": [{"text": t, "embedding": v} for t, v in zip(chosen, vectors, strict=True)]}
    show(document, lambda: put("\n".join(json.dumps(vector) for vector in vectors)))
