"""A stand-in for an inference engine: OpenAI-compatible, starts in a fraction of a second, misbehaves on demand.

    python -m tests.support.fake_engine --port 9000 --model tiny --task generate --load-delay-s 2 --token-rate 50

``--model`` may be given several times (name and aliases). The key is taken from ``VLLM_API_KEY``, as by vLLM. A prompt
may steer its own request: ``@crash`` (the process kills itself before a byte), ``@crash-mid-stream`` (after half of the
tokens), ``@hang`` (never answered), ``@wedge`` (from it on nothing is computed any more, running streams stand still,
and /health is good), ``@sleep=SECONDS`` (``0.1-0.3``: at random), ``@tokens=N``, ``@read=PATH`` (the file's content, or
why not), ``@fail=STATUS``.
Answers echo the model, the process id and the number of the request: ``tiny pid=12 request=3 w1 w2 ...``.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tests.support import fake_adapters, fake_media, fake_sleep
from tests.support.fake_memory import claim
from tests.support.fake_vector import vector
from tests.support.raw_http import Exchange, listen, run, tls_context

_GENERATE = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_EMBED = ("/v1/embeddings", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank")
_SLEEP = re.compile(r"@sleep=([0-9.]+)(?:-([0-9.]+))?")
_READ = re.compile(r"@read=(\S+)")
_TOKENS = re.compile(r"@tokens=(\d+)")
_FAIL = re.compile(r"@fail=(\d+)")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the TLS options carry the names of vLLM's."""
    parser = argparse.ArgumentParser(prog="fake_engine", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any; printed as 'listening HOST:PORT'")
    parser.add_argument("--uds", help="listen on this Unix socket instead")
    parser.add_argument("--model", action="append", default=[], help="a served name; repeatable")
    parser.add_argument("--served-model-name", nargs="+", default=[], help="as vLLM's; then --model is no name")
    parser.add_argument("--task", choices=("generate", "embed"), default="generate")
    parser.add_argument("--load-delay-s", type=float, default=0.0)
    parser.add_argument("--load-visibly", action="store_true", help="listen at once, /health is 503 until loaded")
    parser.add_argument("--token-rate", type=float, default=0.0, help="tokens a second; 0: as fast as it can")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--at-a-time", type=int, default=0, help="requests it works on; others wait in it; 0: all")
    parser.add_argument("--crash-on-start", action="store_true", help="last words on stderr, exit code 3")
    parser.add_argument("--crash-after-requests", type=int, default=-1, metavar="N")
    parser.add_argument("--hang-after", type=int, default=-1, metavar="N", help="then answer nothing, not even /health")
    parser.add_argument("--metrics", action="store_true", help="GET /metrics, with vLLM's names")
    parser.add_argument("--wedge-metrics", action="store_true", help="once wedged it does not answer /metrics either")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--children", type=int, default=0, help="child processes, as vLLM has")
    parser.add_argument("--memory-marker", type=Path, help="folder that counts what all fake engines hold")
    parser.add_argument("--memory-mib", type=int, default=0, help="what this one holds")
    parser.add_argument("--memory-room-mib", type=int, default=0, help="exit 9 if all together would hold more")
    parser.add_argument("--record", type=Path, help="append one JSON line a request: path, headers, body size")
    parser.add_argument("--ssl-keyfile")
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--ssl-ca-certs")
    parser.add_argument("--ssl-cert-reqs", type=int, default=0)
    parser.add_argument("--media", action="store_true", help="audio and images, whatever its task (fake_media)")
    fake_adapters.add_options(parser)
    fake_sleep.add_options(parser)
    return parser.parse_args(argv)


class Engine:
    """The handler and its counters."""

    def __init__(self, given: argparse.Namespace, loaded_at: float) -> None:
        self.given = given
        self.names: tuple[str, ...] = tuple(given.served_model_name or given.model or ["fake"])
        self.key = os.environ.get("VLLM_API_KEY", "")
        self.loaded_at = loaded_at
        self.sleep = fake_sleep.Sleep(given)
        self.adapters = fake_adapters.Adapters(given)
        self.requests = 0
        self.running = 0
        self.places = asyncio.Semaphore(given.at_a_time or 1_000_000)
        self.finished = 0
        self.tokens = 0
        self.wedged = False
        self.last_metrics = b""
        """As they were when it was wedged: vLLM's scheduler sets them."""

    def __call__(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        request = exchange.request
        if 0 <= self.given.hang_after <= self.requests:
            return _forever()
        if request.path == "/health":
            exchange.send(200 if time.monotonic() >= self.loaded_at else 503, b"{}")
            return None
        if self.given.record is not None:
            self._record(exchange)
        if self.sleep.takes(exchange):
            return self.sleep(exchange)
        if self.key and not hmac.compare_digest(request.header("authorization"), f"Bearer {self.key}"):
            _fail(exchange, 401, "wrong engine key")
            return None
        if request.path == "/v1/models":
            cards = [{"id": name, "object": "model", "max_model_len": 4096} for name in self.names]
            cards += self.adapters.cards(self.names[0])
            exchange.send(200, json.dumps({"object": "list", "data": cards}).encode())
            return None
        if self.adapters.takes(exchange):
            self.adapters(exchange)
            return None
        if request.path == "/metrics" and self.given.metrics:
            if self.wedged and self.given.wedge_metrics:
                return _forever()
            exchange.send(200, self.last_metrics or self._metrics(), "text/plain; version=0.0.4")
            return None
        if request.method != "POST":
            _fail(exchange, 405, "method not allowed")
            return None
        if self.given.media and request.path in fake_media.FORMS:
            return self._form(exchange)
        try:
            body = json.loads(request.body)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            _fail(exchange, 400, "There was an error parsing the body")
            return None
        work = self._infer(exchange, request.path, body)
        return None if work is None else self._counted(work)

    def _form(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        form = fake_media.read_form(exchange)
        if form is None:
            _fail(exchange, 400, "There was an error parsing the body")
            return None
        model = form.fields.get("model") or self.names[0]
        if model not in self.names:
            _fail(exchange, 404, f"the model {model!r} does not exist")
            return None
        self.requests += 1
        return fake_media.told(exchange, model, form)

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        self.running += 1
        try:
            async with self.places:
                await work
        finally:
            self.running -= 1

    def _metrics(self) -> bytes:
        labels = f'engine="0",model_name="{self.names[0]}"'
        rows = {
            f"vllm:num_requests_running{{{labels}}}": self.running,
            f"vllm:num_requests_waiting{{{labels}}}": 0,
            f"vllm:kv_cache_usage_perc{{{labels}}}": 0,
            f"vllm:prompt_tokens_total{{{labels}}}": self.requests,
            f"vllm:generation_tokens_total{{{labels}}}": self.tokens,
            f'vllm:request_success_total{{{labels},finished_reason="stop"}}': self.finished,
            f'vllm:request_success_total{{{labels},finished_reason="abort"}}': 0,
        }
        return "".join(f"{name} {float(value)}\n" for name, value in rows.items()).encode()

    async def _wedge(self) -> None:
        self.wedged = True
        self.last_metrics = self._metrics()
        await _forever()

    def _later(self, exchange: Exchange, answer: dict[str, Any], delay: float) -> Coroutine[Any, Any, None] | None:
        if not delay:
            self.finished += 1
            exchange.send(200, json.dumps(answer).encode())
            return None

        async def late() -> None:
            await asyncio.sleep(delay)
            if self.wedged:
                await _forever()
            self.finished += 1
            exchange.send(200, json.dumps(answer).encode())

        return late()

    def _infer(self, exchange: Exchange, path: str, body: dict[str, Any]) -> Coroutine[Any, Any, None] | None:
        model = body.get("model", self.names[0])
        if model not in self.names and model not in self.adapters.loaded:
            _fail(exchange, 404, f"the model {model!r} does not exist")
            return None
        self.requests += 1
        number = self.requests
        if 0 <= self.given.crash_after_requests < number:
            _die()
        text = _prompt(body)
        if "@crash" in text.replace("@crash-mid-stream", ""):
            _die()
        delay = random.uniform(float(m[1]), float(m[2] or m[1])) if (m := _SLEEP.search(text)) else 0.0
        if "@wedge" in text:
            return self._wedge()
        if "@hang" in text or self.wedged or self.sleep.hangs:
            return _forever()
        if failure := _FAIL.search(text):
            _fail(exchange, int(failure[1]), "as it was told")
            return None
        if path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
            answer = {"count": len(text.split()), "tokens": [len(word) for word in text.split()], "model": model}
            return self._later(exchange, answer, delay)
        if path in fake_media.JSON and self.given.media:
            return fake_media.made(exchange, path, body)
        if path in _EMBED and self.given.task == "embed":
            return self._later(exchange, _embeddings(body, model, number), delay)
        if path in _GENERATE and self.given.task == "generate":
            return self._generate(exchange, path, body, model, number, text, delay)
        exchange.send(404, b'{"detail":"Not Found"}')  # as vLLM, whose paths depend on the task
        return None

    def _generate(
        self, exchange: Exchange, path: str, body: dict[str, Any], model: str, number: int, text: str, delay: float
    ) -> Coroutine[Any, Any, None] | None:
        wanted = int(match[1]) if (match := _TOKENS.search(text)) else self.given.tokens
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        count = max(1, min(wanted, int(limit)) if limit else wanted)
        if named := _READ.search(text):
            return self._later(exchange, _answer(path, model, number, [_reading(Path(named[1]))]), delay)
        if body.get("logprobs"):
            word, likely = self.sleep.first_word(model)
            return self._later(exchange, _answer(path, model, number, [word], likely), delay)
        words = [f"{model} pid={os.getpid()} request={number}"] + [f" w{i}" for i in range(1, count)]
        if body.get("stream"):
            return self._stream(exchange, path, model, number, words, delay, "@crash-mid-stream" in text)
        if self.given.token_rate:
            delay += count / self.given.token_rate
        return self._later(exchange, _answer(path, model, number, words), delay)

    async def _stream(
        self, exchange: Exchange, path: str, model: str, number: int, words: list[str], delay: float, dies: bool
    ) -> None:
        if delay:
            await asyncio.sleep(delay)
        exchange.start()
        begun = time.monotonic()
        for index, word in enumerate(words):
            if self.given.token_rate and (due := begun + index / self.given.token_rate - time.monotonic()) > 0:
                await asyncio.sleep(due)
            if dies and index >= len(words) // 2:
                _die()
            if self.wedged:
                await _forever()
            self.tokens += 1
            await exchange.chunk(b"data: " + json.dumps(_delta(path, model, number, word)).encode() + b"\n\n")
        self.finished += 1
        await exchange.chunk(b"data: [DONE]\n\n")
        exchange.end()

    def _record(self, exchange: Exchange) -> None:
        request = exchange.request
        line = {"path": request.target, "headers": request.headers, "bytes": len(request.body)}
        with self.given.record.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def _prompt(body: dict[str, Any]) -> str:
    """All text that the caller wrote, wherever the path keeps it."""
    parts = [body.get("prompt"), body.get("input"), body.get("text_1"), body.get("query")]
    parts += [message.get("content") for message in body.get("messages", ()) if isinstance(message, dict)]
    return " ".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part is not None)


def _answer(path: str, model: str, number: int, words: list[str], likely: float | None = None) -> dict[str, Any]:
    """``likely``: the log probability of its only token, in vLLM's form."""
    text = "".join(words)
    usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": len(words) + 1}
    base = {"id": f"fake-{number}", "created": int(time.time()), "model": model, "usage": usage}
    if path == "/v1/chat/completions":
        message = {"role": "assistant", "content": text}
        told: Any = None if likely is None else {"content": [{"token": text, "logprob": likely}]}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": told}
        return {**base, "object": "chat.completion", "choices": [choice]}
    told = None if likely is None else {"tokens": [text], "token_logprobs": [likely]}
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": told}
    return {**base, "object": "text_completion", "choices": [choice], "content": [{"type": "text", "text": text}]}


def _delta(path: str, model: str, number: int, word: str) -> dict[str, Any]:
    base = {"id": f"fake-{number}", "created": int(time.time()), "model": model}
    if path == "/v1/chat/completions":
        choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
        return {**base, "object": "chat.completion.chunk", "choices": [choice]}
    return {**base, "object": "text_completion", "choices": [{"index": 0, "text": word, "finish_reason": None}]}


def _embeddings(body: dict[str, Any], model: str, number: int) -> dict[str, Any]:
    given = body.get("input", _prompt(body))
    texts = given if isinstance(given, list) else [given]
    data = [{"object": "embedding", "index": i, "embedding": vector(str(text))} for i, text in enumerate(texts)]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return {"object": "list", "id": f"fake-{number} pid={os.getpid()}", "model": model, "data": data, "usage": usage}


def _fail(exchange: Exchange, status: int, message: str) -> None:
    exchange.send(status, json.dumps({"error": {"message": message, "type": "fake", "code": status}}).encode())


def _reading(path: Path) -> str:
    try:
        return path.read_text(errors="replace") if path.is_file() else " ".join(sorted(os.listdir(path)))
    except OSError as error:
        return type(error).__name__


def _die() -> None:
    """As a segmentation fault would: no clean-up, no answer."""
    print("fake engine: fatal: asked to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def _forever() -> None:
    await asyncio.Event().wait()


async def serve(given: argparse.Namespace) -> None:
    """Load, listen, serve until SIGTERM or SIGINT."""
    loaded_at = time.monotonic() + given.load_delay_s
    tls: ssl.SSLContext | None = None
    if given.ssl_certfile:
        keyfile = given.ssl_keyfile or given.ssl_certfile
        tls = tls_context(keyfile, given.ssl_certfile, given.ssl_ca_certs, given.ssl_cert_reqs)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if given.ignore_sigterm else stop.set)
    children = [subprocess.Popen(["sleep", "infinity"]) for _ in range(given.children)]
    try:
        if not given.load_visibly:
            try:
                await asyncio.wait_for(stop.wait(), given.load_delay_s)
                return
            except TimeoutError:
                pass  # loaded
        server = await listen(Engine(given, loaded_at), given.host, given.port, given.uds, tls)
        if given.uds:
            print(f"listening {given.uds}", flush=True)
        else:
            host, port = server.sockets[0].getsockname()[:2]  # type: ignore[attr-defined]
            print(f"listening {host}:{port}", flush=True)
        await stop.wait()
        server.close()
    finally:
        for child in children:
            child.kill()
            child.wait()


def main() -> None:
    """The program."""
    given = options()
    if given.crash_on_start:
        print("fake engine: loading weights\nfake engine: RuntimeError: asked to crash on start", file=sys.stderr)
        sys.exit(3)
    if given.memory_marker is not None and not claim(given.memory_marker, given.memory_mib, given.memory_room_mib):
        print(f"fake engine: out of memory: {given.memory_room_mib} MiB are not enough", file=sys.stderr)
        sys.exit(9)
    run(serve(given))


if __name__ == "__main__":
    main()
