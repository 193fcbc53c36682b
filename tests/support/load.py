"""Clients of a running gateway, in a thread of their own, that account for every request they send.

with load(gateway, ("a", "b")) as account:
    ...                                       # the events under test
assert not account.failed and not account.cut
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.support.gateways import Gateway, chat_body

END_S = 150.0
"""How long the last requests may take; longer than a gateway of the tests lets one wait."""


@dataclass(frozen=True)
class Trouble:
    """A request that was not answered."""

    model: str
    stream: bool
    sent_at: float
    """Monotonic seconds."""
    ended_at: float
    what: str


@dataclass
class Account:
    """Every request is in exactly one of ``answered``, ``failed``, ``cut`` and ``refused``."""

    sent: int = 0
    answered: list[tuple[str, bool, float]] = field(default_factory=list)
    """Whole answers: model, whether it streamed, when it was there (monotonic seconds)."""
    failed: list[Trouble] = field(default_factory=list)
    """Error messages, and, worse, streams that end without their terminator: silently."""
    cut: list[Trouble] = field(default_factory=list)
    """Broken transfers, as reported by the client's own library."""
    refused: list[Trouble] = field(default_factory=list)
    """Nothing listened at the front door."""

    def answers(self, model: str | None = None, since: float = 0.0) -> int:
        """How many whole answers came, of one model, after a moment."""
        return sum(model in (None, name) and at >= since for name, _, at in self.answered)

    def __str__(self) -> str:
        return (
            f"{self.sent} sent, {len(self.answered)} answered, {len(self.failed)} failed, {len(self.cut)} cut, "
            f"{len(self.refused)} refused{self._first_failure()}"
        )

    def _first_failure(self) -> str:
        return f"; the first failure: {self.failed[0].what}" if self.failed else ""


@contextmanager
def load(
    gateway: Gateway, models: Sequence[str], *, clients: int = 4, pause_s: float = 0.1, prompt: str = "hello"
) -> Iterator[Account]:
    """Clients that take turns: every second one streams, each goes on to the next model after an answer.

    Ends when every request sent has its end, and checks that the books balance.
    """
    account = Account()
    stop = threading.Event()

    async def clients_run() -> None:
        limits = httpx.Limits(max_connections=clients)
        async with gateway.async_client(limits=limits) as http:
            await asyncio.gather(*(_client(number, http) for number in range(clients)))

    async def _client(number: int, http: httpx.AsyncClient) -> None:
        turn = number
        while not stop.is_set():
            await _ask(http, account, models[turn // 2 % len(models)], stream=turn % 2 == 0, prompt=prompt)
            turn += 1
            await asyncio.sleep(pause_s)

    thread = threading.Thread(target=asyncio.run, args=(clients_run(),), name="load", daemon=True)
    thread.start()
    try:
        yield account
    finally:
        stop.set()
        thread.join(END_S)
        print(f"load on {', '.join(models)}: {account}")
    assert not thread.is_alive(), f"a request has had no end for {END_S:.0f} s: {account}"
    ended = len(account.answered) + len(account.failed) + len(account.cut) + len(account.refused)
    assert ended == account.sent, account


async def _ask(http: httpx.AsyncClient, account: Account, model: str, *, stream: bool, prompt: str) -> None:
    account.sent += 1
    sent_at = time.monotonic()
    body = chat_body(model, prompt, stream=stream)

    def trouble(what: str) -> Trouble:
        return Trouble(model, stream, sent_at, time.monotonic(), what)

    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            text = (await response.aread()).decode()
    except httpx.ConnectError as error:
        account.refused.append(trouble(repr(error)))
    except httpx.TransportError as error:
        kind = account.failed if isinstance(error, httpx.TimeoutException) else account.cut
        kind.append(trouble(repr(error)))
    else:
        whole = text.rstrip().endswith("data: [DONE]") if stream else f"{model} pid=" in text
        if response.status_code == 200 and whole:
            account.answered.append((model, stream, time.monotonic()))
        else:
            account.failed.append(trouble(f"{response.status_code} {text[-400:]}"))
