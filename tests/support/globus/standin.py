"""A stand-in for Globus Compute's web service and Globus Auth, with the limits that the real one documents.

It has one user. Written from the requests of globus-compute-sdk and -endpoint 4.19; everything beyond HTTP (queues,
agents, workers, serialisation) is the real thing.

    python -m tests.support.globus.standin --amqp URL --port N
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import jwt
import pika
import uvicorn
from cryptography.hazmat.primitives.asymmetric import rsa
from globus_compute_common.messagepack import pack, unpack
from globus_compute_common.messagepack.message_types import Result, ResultErrorDetails, Task
from jwt.algorithms import RSAAlgorithm
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.globus.amqp import Amqp, Channel

PAYLOAD_BYTES = 10 * 2**20
_IDENTITY = "11111111-aaaa-4444-8888-000000000001"
PERSON = {"sub": _IDENTITY, "id": _IDENTITY, "username": "ci@example.org", "status": "used"}

_SCOPE = "https://auth.globus.org/scopes/facd7ccc-c5f4-42aa-916b-a0e270e2c2a9/all"
_SCOPES = (_SCOPE, "openid", "urn:globus:auth:scope:auth.globus.org:manage_projects")
_NAMESPACE = uuid.UUID(int=0)
CODE = "the-code"
"""The code that Globus Auth shows to a user at login."""

Document = dict[str, Any]
_OWN = ("group", "user_endpoint", "told")
"""Of a task's document: what the service does not show."""


class Refused(Exception):
    """An error of the service, in its form."""

    def __init__(self, status: int, code: str, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.code, self.reason, self.headers = status, code, reason, headers


class Service:
    """The service's state: endpoints, functions, tasks, task groups. In memory; its queues are RabbitMQ's."""

    def __init__(self, amqp_url: str, requests_per_10s: int, trusts_agents: bool) -> None:
        self._lock = threading.RLock()
        self._requests_per_10s = requests_per_10s
        self._trusts_agents = trusts_agents
        self._recent: collections.deque[float] = collections.deque()
        self.endpoints: dict[str, Document] = {}
        self.functions: dict[str, str] = {}
        self.tasks: dict[str, Document] = {}
        self.groups: dict[str, Document] = {}
        self.counts = collections.Counter[str]()
        self.failures: collections.deque[int] = collections.deque()
        """HTTP statuses with which the next submissions are rejected."""
        self.amqp = Amqp(amqp_url, {"results": self._result, "heartbeats": self._heartbeat})

    # --- reports of agents ---
    def _result(self, channel: Channel, body: bytes) -> None:
        self._finish(channel, unpack(body))

    def _finish(self, channel: Channel, result: Any) -> None:
        """Where the broker ends before it has the result for the task group, the agent's message comes again."""
        with self._lock:
            task = self.tasks.get(str(result.task_id))
            if task is None or "told" in task:
                return
            task.update(
                completion_t=str(time.time()),
                details=result.details,
                status="failed" if result.is_error else "success",
            )
            task["exception" if result.is_error else "result"] = result.data
            wanted = self.groups[task["group"]]["queue"]
        if wanted:
            properties = pika.BasicProperties(timestamp=int(time.time()), delivery_mode=2)
            channel.basic_publish("", f"tg.{task['group']}", pack(result), properties)
        task["told"] = True

    def _heartbeat(self, channel: Channel, body: bytes) -> None:
        """An agent's report: that it lives, or that it could not start."""
        report: Any = unpack(body)
        endpoint, state = str(report.endpoint_id), report.global_state
        with self._lock:
            if endpoint in self.endpoints:
                self.endpoints[endpoint].update(
                    heartbeat=time.time(), period=state.get("heartbeat_period", 30), report=state
                )
            failed = state.get("error")
            lost = [
                task
                for task in self.tasks.values()
                if failed and task["user_endpoint"] == endpoint and "told" not in task
            ]
        for task in lost:
            details = ResultErrorDetails(code="ENDPOINT_START_FAILED", user_message=failed)
            self._finish(channel, Result(task_id=task["task_id"], data=failed, error_details=details))

    # --- endpoints and functions ---
    def register_endpoint(self, endpoint: str, document: Document) -> Document:
        with self._lock:
            self.endpoints.setdefault(endpoint, {"heartbeat": 0.0, "period": 0.0}).update(
                allowed=document.get("allowed_functions"), document=document
            )
        self.amqp.call(lambda channel: channel.queue_declare(f"cmd.{endpoint}", durable=True))
        return {
            "endpoint_id": endpoint,
            "heartbeat_queue_info": self._queue(endpoint, "heartbeats"),
            "command_queue_info": {"connection_url": self.amqp.url, "queue": f"cmd.{endpoint}"},
        }

    def endpoint_status(self, endpoint: str) -> Document:
        with self._lock:
            found = self.endpoints.get(endpoint)
            if found is None:
                raise Refused(404, "ENDPOINT_NOT_FOUND", endpoint)
            online = found["period"] and time.time() - found["heartbeat"] < 2 * found["period"] + 5
            return {"status": "online" if online else "offline", "details": found.get("report", {})}

    def delete_endpoint(self, endpoint: str) -> Document:
        with self._lock:
            if self.endpoints.pop(endpoint, None) is None:
                raise Refused(404, "ENDPOINT_NOT_FOUND", endpoint)
        return {"result": 302}

    def register_function(self, document: Document) -> Document:
        code = document["function_code"]
        if not document.get("serialized", True):  # register_source_code(): the service wraps it
            source = f"st\n{document['function_name']}:{code}"
            code = f"{len(source)}\n{source}"
        function = str(uuid.uuid5(_NAMESPACE, code))
        self.functions[function] = code
        return {"function_uuid": function}

    # --- tasks ---
    def submit(self, endpoint: str, document: Document) -> Document:
        found = self._permitted(endpoint, document["tasks"])
        options, runtime = document.get("user_endpoint_config") or {}, document.get("user_runtime") or {}
        digest = hashlib.sha256(json.dumps([endpoint, PERSON, options, runtime], sort_keys=True).encode())
        short = digest.hexdigest()[:16]
        user_endpoint = str(uuid.uuid5(_NAMESPACE, short))  # one for each person and set of options
        group = document.get("task_group_id") or str(uuid.uuid4())
        out: dict[str, list[str]] = {}
        messages = []
        with self._lock:
            entry = self.groups.setdefault(group, {"queue": False, "tasks": []})
            entry["queue"] |= bool(document.get("create_queue"))
            for function, payloads in document["tasks"].items():
                for payload in payloads:
                    task = str(uuid.uuid4())
                    out.setdefault(function, []).append(task)
                    entry["tasks"].append(task)
                    self.tasks[task] = {
                        "task_id": task, "status": "pending", "group": group, "user_endpoint": user_endpoint,
                    }  # fmt: skip
                    self.counts.update(tasks=1, payload_bytes=len(payload))
                    headers = {
                        "function_uuid": function,
                        "task_uuid": task,
                        "resource_specification": json.dumps(document.get("resource_specification")),
                        "result_serializers": document.get("result_serializers") or [],
                    }
                    body = pack(Task(task_id=uuid.UUID(task), task_buffer=self.functions[function] + payload))
                    messages.append((body, headers))
        start = {
            "command": "cmd_start_endpoint",
            "args": [],
            "globus_effective_identity": PERSON["sub"],
            "globus_username": PERSON["username"],
            "globus_identity_set": [PERSON],
            "kwargs": {
                "name": f"uep.{endpoint}.{short}",
                "user_opts": options,
                "user_runtime": runtime,
                "amqp_creds": {
                    "endpoint_id": user_endpoint,
                    "task_queue_info": {"connection_url": self.amqp.url, "queue": f"task.{user_endpoint}"},
                    "result_queue_info": self._queue(user_endpoint, "results"),
                    "heartbeat_queue_info": self._queue(user_endpoint, "heartbeats"),
                },
            },
        }
        todo = list(messages)

        def publish(channel: Channel) -> None:
            for queue in (f"task.{user_endpoint}", f"tg.{group}"):
                channel.queue_declare(queue, durable=True)
            command = pika.BasicProperties(content_type="application/json", timestamp=int(time.time()), delivery_mode=2)
            channel.basic_publish("", f"cmd.{endpoint}", json.dumps(start).encode(), command)
            while todo:  # what the broker has confirmed is not sent again
                body, headers = todo[0]
                channel.basic_publish(
                    "", f"task.{user_endpoint}", body, pika.BasicProperties(delivery_mode=2, headers=headers)
                )
                todo.pop(0)

        self.amqp.call(publish)
        found["submitted"] = found.get("submitted", 0) + len(messages)
        return {"tasks": out, "task_group_id": group, "request_id": str(uuid.uuid4()), "endpoint_id": endpoint}

    def _permitted(self, endpoint: str, tasks: Document) -> Document:
        with self._lock:
            found = self.endpoints.get(endpoint)
            if found is None:
                raise Refused(404, "ENDPOINT_NOT_FOUND", endpoint)
            for function in tasks:
                if function not in self.functions:
                    raise Refused(404, "FUNCTION_NOT_FOUND", function)
                if found["allowed"] is not None and function not in found["allowed"] and not self._trusts_agents:
                    raise Refused(403, "FUNCTION_NOT_PERMITTED", function)
            return found

    def task(self, task: str) -> Document:
        with self._lock:
            if task not in self.tasks:
                raise Refused(404, "TASK_NOT_FOUND", task)
            return {key: value for key, value in self.tasks[task].items() if key not in _OWN}

    def group(self, group: str) -> Document:
        with self._lock:
            if group not in self.groups:
                raise Refused(404, "TASK_GROUP_NOT_FOUND", group)
            return {"taskgroup_id": group, "tasks": [{"id": task} for task in self.groups[group]["tasks"]]}

    def count_request(self, now: float) -> None:
        """Raises ``Refused`` (429) past the limit of requests within 10 s."""
        with self._lock:
            while self._recent and self._recent[0] < now - 10:
                self._recent.popleft()
            if len(self._recent) >= self._requests_per_10s:
                self.counts.update(refused=1)
                wait_s = max(1, round(self._recent[0] + 10 - now + 0.5))
                raise Refused(429, "TOO_MANY_REQUESTS", "20 requests within 10 s", **{"Retry-After": str(wait_s)})
            self._recent.append(now)
            self.counts.update(requests=1)

    def _queue(self, endpoint: str, exchange: str) -> Document:
        return {
            "connection_url": self.amqp.url,
            "exchange": exchange,
            "queue": f"svc.{exchange}",
            "queue_publish_kwargs": {
                "exchange": exchange,
                "routing_key": endpoint,
                "mandatory": True,
                "properties": {"delivery_mode": 2},
            },
        }


class Signer:
    """Globus Auth's key, which signs identities."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.public = RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True) | {"alg": "RS512"}

    def identity(self, client: str) -> str:
        """The claims of a user's tokens for ``client``."""
        claims = {**PERSON, "aud": client, "iat": int(time.time()), "exp": int(time.time()) + 3600}
        return jwt.encode(claims, self._key, algorithm="RS512")


def application(service: Service) -> Starlette:
    """The service over HTTP. ``/standin/...`` is the tests' own."""
    auth = Signer()

    def authorized(request: Request, counted: bool = True) -> None:
        if not request.headers.get("authorization", "").startswith("Bearer standin-"):
            raise Refused(401, "UNAUTHORIZED", "no token of this stand-in")
        if counted:
            service.count_request(time.monotonic())

    async def token(request: Request) -> Response:
        """Globus Auth: a client's own credentials, the code that a user typed, or a token's renewal."""
        form = parse_qs((await request.body()).decode())
        grant = form["grant_type"][0]
        if grant == "authorization_code" and form["code"] != [CODE]:
            return JSONResponse({"error": "invalid_grant"}, 401)
        servers: dict[str, list[str]] = {}
        for scope in form["scope"][0].split() if "scope" in form else _SCOPES:
            servers.setdefault("funcx_service" if scope == _SCOPE else "auth.globus.org", []).append(scope)
        tokens = [
            {
                "access_token": f"standin-{server}", "scope": " ".join(scopes), "resource_server": server,
                "expires_in": 172800, "token_type": "Bearer",
                **({} if grant == "client_credentials" else {"refresh_token": f"again-{server}"}),
            }
            for server, scopes in servers.items()
        ]  # fmt: skip
        more = {"id_token": auth.identity(form["client_id"][0])} if grant == "authorization_code" else {}
        return JSONResponse({**tokens[0], **more, "other_tokens": tokens[1:]})

    async def openid(request: Request) -> Response:
        keys = str(request.url_for("jwk"))
        return JSONResponse({"jwks_uri": keys, "id_token_signing_alg_values_supported": ["RS512"]})

    async def jwk(request: Request) -> Response:
        return JSONResponse({"keys": [auth.public]})

    async def person(request: Request) -> Response:
        return JSONResponse({**PERSON, "identity_set": [PERSON]})

    async def version(request: Request) -> Response:
        return JSONResponse({"api": "standin", "min_sdk_version": "2.0.0", "min_ep_version": "2.0.0"})

    async def register(request: Request) -> Response:
        authorized(request, counted=False)
        endpoint = request.path_params.get("endpoint") or str(uuid.uuid4())
        return JSONResponse(await run_in_threadpool(service.register_endpoint, endpoint, await request.json()))

    async def status(request: Request) -> Response:
        return JSONResponse(service.endpoint_status(request.path_params["endpoint"]))

    async def delete(request: Request) -> Response:
        authorized(request, counted=False)
        return JSONResponse(service.delete_endpoint(request.path_params["endpoint"]))

    async def function(request: Request) -> Response:
        authorized(request, counted=False)
        return JSONResponse(service.register_function(await request.json()))

    async def result_queue(request: Request) -> Response:
        authorized(request, counted=False)
        return JSONResponse({"queue_prefix": "tg.", "connection_url": service.amqp.url})

    async def submit(request: Request) -> Response:
        authorized(request)
        if service.failures:
            raise Refused(service.failures.popleft(), "TOLD_TO_FAIL", "a test wants it so")
        raw = await request.body()
        if len(raw) > PAYLOAD_BYTES:
            raise Refused(413, "TASK_PAYLOAD_TOO_LARGE", f"{len(raw)} bytes, at most {PAYLOAD_BYTES}")
        document = json.loads(raw)
        return JSONResponse(await run_in_threadpool(service.submit, request.path_params["endpoint"], document))

    async def task(request: Request) -> Response:
        authorized(request)
        return JSONResponse(service.task(request.path_params["task"]))

    async def tasks(request: Request) -> Response:
        authorized(request)
        wanted = (await request.json())["task_ids"]
        return JSONResponse({"results": {i: service.task(i) for i in wanted if i in service.tasks}})

    async def group(request: Request) -> Response:
        authorized(request)
        return JSONResponse(service.group(request.path_params["group"]))

    async def counts(request: Request) -> Response:
        return JSONResponse(dict(service.counts))

    async def fail(request: Request) -> Response:
        service.failures.extend(await request.json())
        return JSONResponse({})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        body = {"code": error.code, "reason": error.reason, "http_status_code": error.status}
        return JSONResponse(body, error.status, error.headers)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        service.amqp.start()
        await run_in_threadpool(service.amqp.ready.wait, 20)
        yield

    return Starlette(
        lifespan=life,
        exception_handlers={Refused: refused},
        routes=[
            Route("/v2/oauth2/token", token, methods=["POST"]),
            Route("/v2/oauth2/userinfo", person),
            Route("/.well-known/openid-configuration", openid),
            Route("/jwk.json", jwk),
            Route("/v2/version", version),
            Route("/v3/endpoints", register, methods=["POST"]),
            Route("/v3/endpoints/{endpoint}", register, methods=["PUT"]),
            Route("/v2/endpoints/{endpoint}/status", status),
            Route("/v2/endpoints/{endpoint}", delete, methods=["DELETE"]),
            Route("/v3/functions", function, methods=["POST"]),
            Route("/v2/get_amqp_result_connection_url", result_queue),
            Route("/v3/endpoints/{endpoint}/submit", submit, methods=["POST"]),
            Route("/v2/tasks/{task}", task),
            Route("/v2/batch_status", tasks, methods=["POST"]),
            Route("/v2/taskgroup/{group}", group),
            Route("/standin/counts", counts),
            Route("/standin/fail", fail, methods=["POST"]),
        ],
    )


class AbsoluteForm:
    """A proxy's request form: ``http_proxy`` leads ``http://localhost:5000``, fixed in the SDK, to any port."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path", "").startswith("http://"):
            scope = {**scope, "path": "/" + scope["path"].split("/", 3)[3]}
        await self._app(scope, receive, send)


def main() -> None:
    """Serve on loopback until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amqp", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests-per-10s", type=int, default=20)
    parser.add_argument("--trust-agents", action="store_true", help="leave the allow-list to the agent alone")
    options = parser.parse_args()
    service = Service(options.amqp, options.requests_per_10s, options.trust_agents)
    app = AbsoluteForm(application(service))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
