"""What runs on the endpoint for a remote caller: one pack of requests to the site's gateway, answered with data.

The text of this file is what is registered with Globus Compute (entry point ``infer``), so it uses nothing but the
standard library and knows nothing of this package. Address, key and folders come from the site's own file, named by
the endpoint's environment, never from the caller. Errors are answers too; nothing is raised.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

FUNCTION_VERSION = "1.2.0"
PROTOCOL = 1

SITE_VARIABLE = "GATEWAY_ENDPOINT_SITE"
"""Environment of the endpoint's workers: the path of the site's file."""
CALLER_VARIABLE = "GATEWAY_ENDPOINT_CALLER"
"""Environment of the endpoint's workers: the caller's Globus identity, where the endpoint mapped one."""

POST_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling",
    "/tokenize", "/detokenize", "/v1/images/generations",
)  # fmt: skip
FILE_PATHS = ("/v1/audio/speech", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits")
"""What the gateway serves and a task cannot carry."""
GET_PATHS = ("/v1/models",)

ITEMS_MAX = 10_000
DEADLINE_MAX_S = 6 * 3600.0
RESULT_BYTES = 9_500_000
"""Of one answer, as JSON; the service takes 10 MB, with an envelope of its own."""
LINE_BYTES = 1_000_000
"""Of one line of an input file."""
INPUT_BYTES = 64_000_000
"""Of the lines of one pack."""
FILE_BYTES = 2_000_000_000
"""Of an input file: all of it is read for its checksum."""
HELD_BYTES = 2 * RESULT_BYTES
"""Of a pack's answers, while it is worked on."""
KEPT_S = 3600.0
KEPT_BYTES = 256_000_000
"""Of all kept answers of one local user."""
KEPT_PACK_BYTES = 2 * RESULT_BYTES
"""Of those of one pack: more than one result holds."""
KEPT_ENTRY_BYTES = 4096
"""What a file takes besides its contents."""
SWEEP_S = 60.0
UNREACHABLE_S = 5.0
"""A gateway that takes no connection for so long is down: it restarts faster."""
HANG_UPS = 4
"""In a row, of a gateway that takes connections: it restarts with fewer."""
CONCURRENCY = 64
TALLY = "tally"
ROOM = "room"

# Not now, but perhaps before the deadline.
_AGAIN = {
    "wait_deadline", "model_queue_full", "not_routed", "unavailable", "controller_restarting", "rate_limited",
    "model_unloaded",
}  # fmt: skip

Answer = dict[str, Any]


class Refusal(Exception):
    """The request as a whole is not done: why, in OpenAI's form."""

    def __init__(self, code: str, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.error = {"message": message, "type": kind, "code": code, "param": None}


def infer(request: Any) -> Answer:
    """Answer one pack. The form of request and answer: docs/globus.md; a refusal is ``{"version", ..., "error"}``."""
    began = time.monotonic()
    head: Answer = {"version": PROTOCOL, "function": FUNCTION_VERSION}
    try:
        check_request(request)
        deadline = began + request["deadline_s"]
        site = read_site()
        caller = os.environ.get(CALLER_VARIABLE, "")
        items = request["items"] if "items" in request else read_input(site, request["input"], deadline)
        gateway = Gateway(site, read_key(site), caller, request["wait"], deadline)
        with opened_answers(site, caller, request, deadline) as store:
            todo = [index for index in range(len(items)) if not is_final(store.found.get(index))]
            done = dict(store.found)
            done.update(run_items(gateway, items, todo, store.append))
            store.count_task()
        answers = [done[index] for index in range(len(items))]
        fit(answers, RESULT_BYTES)
        # the key too: by it a client that has nothing but its task group puts the answers in order
        return {
            **head,
            "key": request["key"],
            "items": answers,
            "seconds": round(time.monotonic() - began, 3),
            "repeated": not todo,
        }
    except Refusal as refusal:
        return {**head, "error": refusal.error}
    except Exception as error:  # noqa: BLE001 - an answer, not a traceback with what was asked
        return {**head, "error": unforeseen(error)["error"]}


# --- the request ---
def check_request(request: Any) -> None:
    """Raises ``Refusal`` for anything that is not exactly a request."""
    if not isinstance(request, dict) or not all(isinstance(name, str) for name in request):
        raise Refusal("invalid_request", "A request is a JSON object.")
    if request.get("version") != PROTOCOL:
        raise Refusal("invalid_request", f"This function speaks version {PROTOCOL}, not {request.get('version')!r}.")
    refuse_unknown(request, {"version", "key", "deadline_s", "wait", "items", "input"}, "request")
    if not isinstance(request.get("key"), str) or not re.fullmatch(r"[A-Za-z0-9_-]{8,64}", request["key"]):
        raise Refusal("invalid_request", "'key' is 8 to 64 letters, digits, '_' and '-'.")
    seconds = request.get("deadline_s")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= DEADLINE_MAX_S:
        raise Refusal("invalid_request", f"'deadline_s' is a number above 0 and at most {DEADLINE_MAX_S:.0f}.")
    if not isinstance(request.get("wait"), bool):
        raise Refusal("invalid_request", "'wait' is true or false.")
    if ("items" in request) == ("input" in request):
        raise Refusal("invalid_request", "A request has either 'items' or 'input'.")
    if "items" in request:
        items = request["items"]
        if not isinstance(items, list) or not 1 <= len(items) <= ITEMS_MAX:
            raise Refusal("invalid_request", f"'items' is a list of 1 to {ITEMS_MAX} requests.")
        for number, item in enumerate(items):
            check_item(item, f"item {number}")
    else:
        check_input(request["input"])


def check_item(item: Any, where: str) -> None:
    """Raises ``Refusal`` unless it is a path of the allow-list with the body that belongs to it."""
    if not isinstance(item, dict):
        raise Refusal("invalid_request", f"{where} is not a JSON object.")
    if "url" in item and "path" not in item:
        words = f"{where} is a line of OpenAI's batch API: write {{'path': URL, 'body': BODY}}; answers come in order."
        raise Refusal("unknown_option", words)
    refuse_unknown(item, {"path", "body"}, where)
    path = item.get("path")
    if path in GET_PATHS and "body" not in item:
        return
    if path in FILE_PATHS:
        words = (
            f"{where}: {path} takes or answers with a file, and a task is JSON: send it over HTTP, through a tunnel."
        )
        raise Refusal("path_not_allowed", words)
    if path not in POST_PATHS:
        raise Refusal("path_not_allowed", f"{where}: {str(path)[:100]!r} is not a path that this endpoint serves.")
    if not isinstance(item.get("body"), dict):
        raise Refusal("invalid_request", f"{where}: 'body' is a JSON object.")
    if item["body"].get("stream"):
        raise Refusal("no_streaming", f"{where}: there is no streaming through Globus Compute; leave 'stream' out.")


def check_input(given: Any) -> None:
    """Raises ``Refusal`` unless it names a file, its checksum and a range of lines."""
    if not isinstance(given, dict):
        raise Refusal("invalid_request", "'input' is a JSON object.")
    refuse_unknown(given, {"path", "sha256", "start", "count"}, "'input'")
    if not isinstance(given.get("path"), str):
        raise Refusal("invalid_request", "'input.path' is a path below the endpoint's input folder.")
    if not isinstance(given.get("sha256"), str) or not re.fullmatch(r"[0-9a-f]{64}", given["sha256"]):
        raise Refusal("invalid_request", "'input.sha256' is 64 hexadecimal digits, lower case.")
    for name, least, most in (("start", 0, 10**12), ("count", 1, ITEMS_MAX)):
        number = given.get(name)
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise Refusal("invalid_request", f"'input.{name}' is a whole number from {least} to {most}.")


def refuse_unknown(given: dict[str, Any], known: set[str], where: str) -> None:
    """Raises ``Refusal`` for a key that is not among ``known``: nobody's URL is taken for an option."""
    unknown = sorted(str(name)[:40] for name in given if name not in known)
    if unknown:
        raise Refusal("unknown_option", f"{where} has unknown keys: {', '.join(unknown[:5])}.")


# --- the site ---
def misconfigured(message: str) -> Refusal:
    """The caller can do nothing about it."""
    return Refusal("endpoint_misconfigured", f"{message} Ask the endpoint's administrators.", "server_error")


def read_site() -> dict[str, Any]:
    """The site's file. Raises ``Refusal`` if there is none."""
    try:
        with open(os.environ[SITE_VARIABLE], encoding="utf-8") as stream:
            site = json.load(stream)
        if site["version"] == 1 and urlsplit(site["url"]).hostname and site["key_file"] and site["answers"]:
            return dict(site)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # said below, without the contents
    raise misconfigured(f"The endpoint's site file (${SITE_VARIABLE}) is missing or not readable.")


def read_key(site: dict[str, Any]) -> str:
    """This local user's own API key. Raises ``Refusal`` if it has none, or others could read it."""
    path = site["key_file"]
    try:
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise misconfigured(f"This user's key file {path} cannot be read ({error.strerror}).") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise misconfigured(f"The key file {path} must be the user's own, with mode 0600.")
        key = os.read(descriptor, 1000).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]{1,256}", key):
        raise misconfigured(f"The key file {path} holds no API key.")
    return key


def read_input(site: dict[str, Any], given: dict[str, Any], deadline: float = float("inf")) -> list[Answer]:
    """The requests in ``count`` lines from line ``start`` of a file below the site's input folder.

    Raises ``Refusal``: no such folder or file, a link or '..' on the way, another checksum, a line that is no request,
    a file that is too large or takes until the deadline.
    """
    if not site.get("input_folder"):
        raise Refusal("no_input_folder", "This endpoint reads no files; send the requests themselves.")
    parts = given["path"].split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise Refusal("input_not_allowed", "'input.path' is relative, and has no '.', '..' or empty part.")
    folder = -1
    try:
        folder = os.open(os.path.expanduser(site["input_folder"]), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise Refusal("input_not_allowed", f"'input.path' cannot be opened: {error.strerror}.") from None
    finally:
        if folder >= 0:
            os.close(folder)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise Refusal("input_not_allowed", "'input.path' is not a plain file.")
        if found.st_size > FILE_BYTES:
            raise Refusal("input_too_large", f"The input file is over {FILE_BYTES} bytes; cut it into several.")
        if given["start"] + given["count"] > found.st_size:  # a line has a byte at least
            raise Refusal("invalid_request", "The input file has too few lines for this range.")
        with open(file, "rb", closefd=False) as stream:
            lines = wanted_lines(stream, given, deadline)
    finally:
        os.close(file)
    items = []
    for number, line in enumerate(lines, given["start"]):
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise Refusal("invalid_request", f"line {number} of the input is not valid JSON.") from None
        check_item(item, f"line {number}")
        items.append(item)
    return items


def wanted_lines(stream: Any, given: dict[str, Any], deadline: float) -> list[bytes]:
    """The lines asked for, of a file that is read once and has the promised checksum as it was read."""
    digest, lines, size = hashlib.sha256(), [], 0
    number = read = 0
    while line := stream.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise Refusal("input_too_large", f"line {number} of the input is over {LINE_BYTES} bytes.")
        if time.monotonic() > deadline:
            raise Refusal("deadline", "The input file was not read within the request's own deadline.", "server_error")
        read += len(line)
        if read > FILE_BYTES:
            raise Refusal("input_too_large", f"The input file grows over {FILE_BYTES} bytes.")
        digest.update(line)
        if given["start"] <= number < given["start"] + given["count"]:
            lines.append(line)
            size += len(line)
        number += 1
        if size > INPUT_BYTES:
            raise Refusal("pack_too_large", f"the lines are over {INPUT_BYTES} bytes; ask for fewer at a time.")
    if digest.hexdigest() != given["sha256"]:
        raise Refusal("checksum_mismatch", "The input file's SHA-256 is another one: it changed, or is not the one.")
    if len(lines) != given["count"]:
        raise Refusal("invalid_request", f"The input file has {number} lines, too few for this range.")
    return lines


# --- asking the gateway ---
class Gateway:
    """The site's gateway, and how long this pack may ask it."""

    def __init__(self, site: dict[str, Any], key: str, caller: str, wait: bool, deadline: float) -> None:
        url = urlsplit(site["url"])
        self.host, self.port, self.tls = str(url.hostname), url.port, None
        if url.scheme == "https":
            try:
                self.tls = ssl.create_default_context(cafile=site.get("ca"))
            except OSError as error:  # an SSLError is one
                why = error.strerror or "it holds no certificate"
                raise misconfigured(f"The authority of the gateway's certificate cannot be read ({why}).") from None
        self.headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        if caller:
            self.headers["x-gateway-caller"] = caller
        self.wait, self.deadline = wait, deadline
        self.down_since: float | None = None
        """When a connection was tried in vain, with none made since."""

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def patience_s(self) -> float:
        """For one step: never none at all."""
        return max(0.1, self.left_s())

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is not open yet."""
        if self.tls is not None:
            return http.client.HTTPSConnection(self.host, self.port, context=self.tls)
        return http.client.HTTPConnection(self.host, self.port)


class Unreachable(Exception):
    """No connection was made; ``tls``: TLS did not come about, and why."""

    def __init__(self, tls: str | None) -> None:
        super().__init__(tls)
        self.tls = tls


class Caller:
    """One connection to the gateway, used by one thread."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._connection = gateway.connect()

    def close(self) -> None:
        """By its own thread."""
        self._connection.close()

    def break_off(self) -> None:
        """From another thread: what it waits for ends, and the engine sees its client leave."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def ask(self, item: Answer) -> Answer:
        """One answer: (1) out of time; (2) the answer; (3) not the gateway that is meant; (4) nobody there; (5) hangs
        up time after time; (6) not now, and the caller waits: again.
        """
        gateway, hung_up = self._gateway, 0
        while True:
            if gateway.left_s() <= 0:  # (1)
                return failed(504, "deadline", "There was no answer within the request's own deadline.")
            try:
                self._connect()
                found, again_s = self._once(item)
                hung_up = 0
                if again_s is None or not gateway.wait:  # (2)
                    return found
            except ssl.SSLCertVerificationError as error:  # (3)
                self._connection.close()
                return untrusted(error.verify_message)
            except Unreachable as error:  # (4)
                self._connection.close()
                now = time.monotonic()
                gateway.down_since = gateway.down_since or now
                if now - gateway.down_since > UNREACHABLE_S:
                    return unreachable("does not answer") if error.tls is None else untrusted(error.tls)
                again_s = 0.25
            except TimeoutError:
                self._connection.close()
                continue
            except (OSError, http.client.HTTPException):  # (5)
                self._connection.close()
                hung_up += 1
                if hung_up > HANG_UPS:
                    return unreachable("breaks off without an answer")
                again_s = 1.0
            time.sleep(max(0.0, min(again_s, gateway.left_s())))  # (6)

    def _connect(self) -> None:
        """Raises ``Unreachable``, or ``ssl.SSLCertVerificationError``."""
        if self._connection.sock is None:
            self._connection.timeout = min(self._gateway.patience_s(), UNREACHABLE_S)
            try:
                self._connection.connect()
            except ssl.SSLCertVerificationError:
                raise
            except OSError as error:
                raise Unreachable(error.reason if isinstance(error, ssl.SSLError) else None) from None
            self._gateway.down_since = None

    def _once(self, item: Answer) -> tuple[Answer, float | None]:
        """The answer, and after how many seconds it is worth asking again (``None``: it is final)."""
        connection, left = self._connection, self._gateway.patience_s()
        connection.sock.settimeout(left)
        headers = {**self._gateway.headers, "x-gateway-wait": f"{left:.0f}" if self._gateway.wait else "0"}
        body = json.dumps(item["body"]).encode() if "body" in item else None
        connection.request("GET" if body is None else "POST", item["path"], body, headers)
        response = connection.getresponse()
        text = response.read(RESULT_BYTES + 1)
        if len(text) > RESULT_BYTES:
            connection.close()
            return too_large(), None
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if response.status == 200 and document is not None:
            return {"status": 200, "body": document}, None
        said = document.get("error") if isinstance(document, dict) else None
        if not isinstance(said, dict):
            said = failed(0, "engine_error", text[:500].decode("utf-8", "replace") or response.reason)["error"]
        status = response.status if response.status != 200 else 502
        retry = response.headers.get("retry-after", "")
        if retry.isdigit():
            said["retry_after_s"] = int(retry)
        again = status in (429, 503) and said.get("code") in _AGAIN
        return {"status": status, "error": said}, float(said.get("retry_after_s", 1)) if again else None


def run_items(
    gateway: Gateway, items: list[Answer], todo: list[int], keep: Callable[[int, Answer], None]
) -> dict[int, Answer]:
    """Answers of the items ``todo``, many at a time, by the deadline; ``keep`` is told each as it comes.

    What is held meanwhile is bounded: past ``HELD_BYTES`` answers that will not fit into the result are let go.
    """
    waiting, done = collections.deque(todo), dict[int, Answer]()
    callers = [Caller(gateway) for _ in range(min(CONCURRENCY, len(todo)))]
    counting, held = threading.Lock(), 0

    def hold(index: int, answer: Answer) -> None:
        nonlocal held
        size = len(json.dumps(answer))
        with counting:
            done[index] = answer
            held += size
            if held > HELD_BYTES:
                order = sorted(done)
                answers = [done[number] for number in order]
                held = fit(answers, RESULT_BYTES)
                done.update(zip(order, answers, strict=True))

    def work(caller: Caller) -> None:
        while True:
            try:
                index = waiting.popleft()
            except IndexError:
                caller.close()
                return
            try:
                answer = caller.ask(items[index])
                hold(index, answer)
                keep(index, answer)
            except Exception as error:  # noqa: BLE001 - of this item alone
                done.setdefault(index, unforeseen(error))

    # Daemons: one that hangs must not keep the worker from ending.
    threads = [threading.Thread(target=work, args=(caller,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, gateway.left_s()) + 0.5)
    for caller in callers:
        caller.break_off()
    late = failed(504, "deadline", "There was no answer within the request's own deadline.")
    with counting:
        return {index: done.get(index, late) for index in todo}


def failed(status: int, code: str, message: str, **more: Any) -> Answer:
    """An item that was not answered by a model."""
    return {
        "status": status,
        "error": {"message": message, "type": "server_error", "code": code, "param": None, **more},
    }


def unforeseen(error: Exception) -> Answer:
    """A mistake of this function, or of the machine that it runs on. The words may hold what was asked: left out."""
    words = f"The function failed at the site ({type(error).__name__}). Tell the endpoint's administrators."
    return failed(500, "internal_error", words)


def unreachable(what: str) -> Answer:
    words = f"The gateway at the endpoint's site {what}. Try again later."
    return failed(503, "gateway_unreachable", words, state="unreachable", eta_s=None)


def untrusted(why: str) -> Answer:
    words = f"The endpoint's site file and the gateway's TLS do not fit ({why}). Ask the endpoint's administrators."
    return failed(503, "endpoint_misconfigured", words)


def too_large() -> Answer:
    return failed(413, "result_too_large", f"The answer is over {RESULT_BYTES} bytes; send it in a smaller pack.")


def is_final(answer: Answer | None) -> bool:
    """It would be the same if it were asked again."""
    return answer is not None and answer["status"] in (200, 400, 422)


def fit(answers: list[Answer], limit_bytes: int) -> int:
    """Replace answers by an error until all fit into ``limit_bytes``: those far larger than the others first, then from
    the end, so that what has to be asked for again is of one piece; small ones, which would make little room, at last.
    How many bytes they are then.
    """
    sizes = [len(json.dumps(answer)) + 2 for answer in answers]
    total, small = sum(sizes) + 500, len(json.dumps(too_large())) + 2
    median = sorted(sizes)[len(sizes) // 2]

    def order(index: int) -> tuple[int, int]:
        size = sizes[index]
        return (0, -size) if size > 4 * median else (1 if size > median / 4 else 2, -index)

    for index in sorted(range(len(answers)), key=order):
        if total <= limit_bytes:
            break
        if sizes[index] > small:
            answers[index] = too_large()
            total += small - sizes[index]
    return total


# --- what was answered before ---
@contextlib.contextmanager
def counted(folder: int) -> Iterator[list[int]]:
    """How much of ``KEPT_BYTES`` all workers of this user have taken: a number in a file, to change under its lock."""
    file = os.open(ROOM, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = os.pread(file, 20, 0)
        taken = [int(said) if said.isdigit() else 0]
        yield taken
        os.pwrite(file, b"%020d" % taken[0], 0)
    finally:
        os.close(file)


class Store:
    """The answers kept under one idempotency key: a JSON line each, written as they come. ``descriptor`` below 0:
    nothing can be kept.
    """

    def __init__(self, descriptor: int, folder: int, digest: str) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._folder, self._size = folder, 0
        self.found: dict[int, Answer] = {}
        if descriptor < 0:
            return
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            stream.seek(0)
            lines = stream.read().split(b"\n")
        for number, line in enumerate(lines[:-1]):
            try:
                document = json.loads(line)
            except ValueError:
                break
            if number == 0 and document["digest"] != digest:
                raise Refusal("key_reused", "This key belongs to another request; take a new key for a new request.")
            if number > 0:
                self.found[document["index"]] = document["answer"]
            self._size += len(line) + 1
        if os.fstat(descriptor).st_size != self._size:  # a killed worker, or a full disk, left a part of a line
            os.ftruncate(descriptor, self._size)
        os.lseek(descriptor, 0, os.SEEK_END)
        if self._size == 0:
            self._write({"digest": digest}, KEPT_ENTRY_BYTES)

    def append(self, index: int, answer: Answer) -> None:
        """Keep one answer that is final, if there is room."""
        if is_final(answer) and self._size:  # not below a first line for which there was no room
            self._write({"index": index, "answer": answer})

    def count_task(self) -> None:
        """One byte more in this user's tally: its length is how many tasks were done, its time when the last was."""
        if self._folder >= 0:
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                tally = os.open(TALLY, flags, 0o600, dir_fd=self._folder)
                with os.fdopen(tally, "wb") as stream:
                    stream.write(b".")

    def close(self) -> None:
        """Nothing is kept any more: a thread that is late must not write into a file that got this number."""
        with self._lock:
            self._descriptor = self._folder = -1

    def _write(self, document: Answer, more: int = 0) -> None:
        data = json.dumps(document).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):  # a full disk costs the repetition, not the answer
            if self._descriptor < 0 or self._size + len(data) > KEPT_PACK_BYTES:
                return
            with counted(self._folder) as taken:
                if taken[0] + len(data) + more <= KEPT_BYTES:
                    taken[0] += len(data) + more
                    self._size += os.write(self._descriptor, data)


def answers_folder(site: dict[str, Any]) -> str:
    """This user's own folder for answers: below the user's own state home, unless the site names a whole path."""
    home = os.environ.get("XDG_STATE_HOME", "")
    home = home if os.path.isabs(home) else os.path.expanduser("~/.local/state")
    return os.path.join(home, f"{site['answers']}-{os.getuid()}")


def made_for_oneself(path: str) -> None:
    """The folder and what is missing above it, 0700: not by the umask, which all threads of the worker share."""
    if os.path.isdir(path):
        return
    made_for_oneself(os.path.dirname(path))
    with contextlib.suppress(FileExistsError):  # another task was quicker
        os.mkdir(path, 0o700)


def opened_folder(path: str) -> int:
    """The folder, 0700; made if there is none. Below 0: it cannot be had, or is another user's."""
    try:
        made_for_oneself(path)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1
    found = os.fstat(folder)
    if found.st_uid != os.getuid():
        os.close(folder)
        return -1
    if found.st_mode & 0o077:
        os.fchmod(folder, 0o700)
    return folder


@contextlib.contextmanager
def opened_answers(site: dict[str, Any], caller: str, request: Answer, deadline: float) -> Iterator[Store]:
    """What this user and caller were answered under this key within the hour, locked: a second one waits. Where the
    folder cannot be had (no home, no room, another user's) there is nothing, and nothing is kept.

    Raises ``Refusal``: the key belongs to another request, or its first use goes on past the deadline.
    """
    asked = {name: value for name, value in request.items() if name not in ("deadline_s", "wait")}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    name = hashlib.sha256(f"{caller}\0{request['key']}".encode()).hexdigest() + ".jsonl"
    path = answers_folder(site)
    folder, descriptor = opened_folder(path), -1
    try:
        if folder >= 0:
            with contextlib.suppress(OSError):
                prune(folder, time.time())
                descriptor = locked(folder, name, deadline)
                sweep(path)
        store = Store(descriptor, folder, digest)
        try:
            yield store
        finally:
            store.close()
    finally:
        for opened in (descriptor, folder):
            if opened >= 0:
                os.close(opened)


def locked(folder: int, name: str, deadline: float) -> int:
    """The file, opened and locked; made if there is none. Raises ``Refusal`` past the deadline, and ``OSError``."""
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        words = "The same request is still being worked on; ask again with the same key."
                        raise Refusal("still_running", words, "server_error") from None
                    time.sleep(0.05)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was pruned while we waited for it


def sweep(path: str) -> None:
    """Have a thread of this worker prune the folder each minute as long as the worker lives; one is enough."""

    def work() -> None:
        while True:
            time.sleep(SWEEP_S)
            with contextlib.suppress(OSError):  # a full disk, or one that is away for a while
                forget(path, time.time())

    name = f"answers {path}"
    if not any(thread.name == name for thread in threading.enumerate()):  # each task has this module anew
        threading.Thread(target=work, name=name, daemon=True).start()


def forget(path: str, now: float = float("inf")) -> None:
    """Remove answers older than an hour from the folder; at the end of time all of them."""
    folder = opened_folder(path) if os.path.isdir(path) else -1
    if folder >= 0:
        try:
            prune(folder, now)
        finally:
            os.close(folder)


def prune(folder: int, now: float) -> None:
    """Remove answers older than an hour, and the oldest ones until there is room for one pack more; those in use are
    left alone.
    """
    with counted(folder) as taken:
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if re.fullmatch(r"[0-9a-f]{64}\.jsonl", entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        files.append((entry.stat(follow_symlinks=False), entry.name))
        taken[0] = sum(found.st_size + KEPT_ENTRY_BYTES for found, _ in files)
        for found, name in sorted(files, key=lambda file: file[0].st_mtime):
            if now - found.st_mtime < KEPT_S and taken[0] <= KEPT_BYTES - KEPT_PACK_BYTES:
                break
            with contextlib.suppress(OSError):
                descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
                    taken[0] -= found.st_size + KEPT_ENTRY_BYTES
                finally:
                    os.close(descriptor)
