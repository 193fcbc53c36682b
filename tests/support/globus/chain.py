"""The whole chain on this machine: RabbitMQ, the stand-in for the service, and the real endpoint, all as one account.

with chain(url, key) as made:
    made.start()
    made.call({"version": 1, ...})
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway_plugin.globus.endpoint import venv as environment
from gateway_plugin.paths import write_private
from tests.support.globus import broker
from tests.support.globus.account import Account, account, end, reachable_python
from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parents[3]
NAME = "gateway"


@dataclass
class Chain:
    """The running parts, and methods to use them."""

    folder: Path
    account: Account
    broker: broker.Broker
    venv: Path
    service_port: int
    operator: Account
    """The account that configures and starts the endpoint."""
    name: str = NAME
    """Of the endpoint."""
    configured: dict[str, Any] = field(default_factory=dict)

    @property
    def endpoint_id(self) -> str:
        return str(self.configured["id"])

    @property
    def function_id(self) -> str:
        return str(self.configured["functions"][-1]["id"])

    @property
    def service_environment(self) -> dict[str, str]:
        """Directs Globus's SDK to the stand-in, that of clients too: its 'local' service is localhost:5000, reached by
        a proxy."""
        here = f"http://127.0.0.1:{self.service_port}"
        return {
            "GLOBUS_SDK_ENVIRONMENT": "local",
            "GLOBUS_SDK_SERVICE_URL_AUTH": f"{here}/",
            "GLOBUS_COMPUTE_CLIENT_ID": "22222222-bbbb-4444-8888-000000000002",
            "GLOBUS_COMPUTE_CLIENT_SECRET": "not-a-secret",
            "GLOBUS_COMPUTE_USER_DIR": str(self.folder / "client"),
            "http_proxy": here,
            "no_proxy": "127.0.0.1",
        }

    @property
    def state(self) -> Path:
        return self.operator.home / "state"

    @property
    def log(self) -> Path:
        return self.state / "endpoints/globus" / self.name / "endpoint.log"

    @property
    def site_file(self) -> Path:
        """What the function reads."""
        return self.state / f"endpoints/{self.name}.site.json"

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``gateway endpoint ...`` as the account."""
        argv, environment, more = self.command(*words)
        ended = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=environment, **more
        )
        assert not check or ended.returncode == 0, f"{words}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def command(self, *words: str) -> tuple[list[str], dict[str, str], dict[str, Any]]:
        """``gateway endpoint ...`` as the account: its command line, its environment, and how to start it."""
        more: dict[str, Any] = {"cwd": self.operator.home}
        if self.operator.switches:
            more |= {"user": self.operator.uid, "group": self.operator.gid, "extra_groups": []}
        elif self.operator.uid == 0:
            more["umask"] = 0o077  # as on a hardened machine: what it shares must be readable all the same
        environment = self.operator.environment(
            GATEWAY_PLAIN_HTTP="1",  # where a fake engine stands for the gateway
            **self.service_environment,
            PYTHONPATH=str(self.folder / "src"),
            GATEWAY_STATE=str(self.state),
            GATEWAY_RUN_ROOT=str(self.folder / "run"),
        )
        return [str(self.venv / "bin/python"), "-m", "gateway_plugin.cli.main", "endpoint", *words], environment, more

    def start(self) -> None:
        """Start the endpoint; it is online afterwards."""
        self.cli("start", self.name, "--json")

    def stop(self) -> None:
        """Stop the endpoint."""
        self.cli("stop", self.name, "--json")

    def executor(self, **options: Any) -> Any:
        """The real ``Executor``, JSON both ways unless ``options`` differ; set ``service_environment`` first."""
        from globus_compute_sdk import Executor
        from globus_compute_sdk.serialize import ComputeSerializer, JSONData, PureSourceTextInspect

        both = [JSONData, PureSourceTextInspect]
        chosen: dict[str, Any] = {
            "serializer": ComputeSerializer(strategy_data=JSONData(), allowed_deserializer_types=both),
            "result_serializers": [JSONData],
            "task_group_id": uuid.uuid4(),
            "api_burst_limit": 8,
            "api_burst_window_s": 1,
            **options,
        }
        return Executor(endpoint_id=self.endpoint_id, **chosen)

    def call(self, request: Mapping[str, Any], within_s: float = 60.0) -> Any:
        """One task with one request; its result."""
        made = self.executor()
        future = made.submit_to_registered_function(self.function_id, args=(dict(request),))
        try:
            return future.result(within_s)
        finally:
            made.shutdown(wait=future.done(), cancel_futures=True)

    def fail(self, *statuses: int) -> None:
        """Make the stand-in reject its next submissions with these HTTP statuses."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = json.dumps(statuses).encode()
        with opener.open(f"http://127.0.0.1:{self.service_port}/standin/fail", body):
            return

    def counts(self) -> dict[str, int]:
        """The stand-in's counters: requests, tasks, payload_bytes, refused."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.service_port}/standin/counts") as answer:
            return dict(json.load(answer))


def missing() -> str | None:
    """Why the chain cannot run here; ``None``: it can."""
    if reachable_python() is None:
        return "no Python here that an unprivileged user may run"
    return broker.missing()


def _venv(folder: Path) -> Path:
    """The endpoint's environment: kept in build/ between runs where the account can reach it."""
    kept = ROOT / "build"
    reachable = all(parent.stat().st_mode & 0o001 for parent in (ROOT, *ROOT.parents))
    venv = (kept if reachable or os.getuid() != 0 else folder) / "globus-venv"
    venv.parent.mkdir(exist_ok=True)
    environment.make(venv, lambda words: None, python=str(reachable_python()))
    return venv


@contextmanager
def chain(url: str, key: str, *options: str, ca: Path | None = None, standin: tuple[str, ...] = ()) -> Iterator[Chain]:
    """The whole chain, the endpoint configured for the gateway at ``url`` and not started yet; all ended afterwards.

    ``ca``: the certificate authority of that gateway; ``options``: more for ``gateway endpoint configure``;
    ``standin``: more for the stand-in.
    """
    folder = Path(tempfile.mkdtemp(prefix="gwg-", dir="/tmp"))
    folder.chmod(0o755)
    who = account(folder / "home")
    amqp, distribution, mapper, service = free_ports(4)
    (folder / "run").mkdir()
    (folder / "run").chmod(0o1777)  # as /tmp is
    made = Chain(folder, who, broker.Broker(who, amqp, distribution, mapper), _venv(folder), service, operator=who)
    shutil.copytree(ROOT / "gateway_plugin", folder / "src/gateway_plugin")
    key_file = who.folder(who.home / ".config") / "endpoint.key"
    write_private(key_file, key + "\n")
    who.own(key_file)
    child = None
    try:
        made.broker.start()
        with (folder / "standin.log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.support.globus.standin", "--amqp", made.broker.url,
                 "--port", str(service), *standin],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        _until_it_answers(made, child, folder / "standin.log")
        ended = made.cli(
            "configure", NAME, "--url", url, "--key-file", str(key_file), "--venv", str(made.venv),
            "--input-folder", str(who.folder(who.home / "input")), "--heartbeat", "5",
            *_vouched(who, ca), *options, "--json",
        )  # fmt: skip
        made.configured = json.loads(ended.stdout)
        yield made
        made.stop()
    finally:
        _end_watchers()
        if made.configured:
            made.cli("stop", NAME, check=False)
        if child is not None:
            end(child)
        made.broker.stop()
        if os.environ.get("GATEWAY_TEST_KEEP"):
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _vouched(who: Account, ca: Path | None) -> tuple[str, ...]:
    """Options with a copy of the authority's certificate in the account's own home."""
    if ca is None:
        return ()
    copy = who.folder(who.home / ".config") / "gateway-ca.pem"
    write_private(copy, ca.read_bytes())
    who.own(copy)
    return ("--ca", str(copy))


@contextmanager
def beside(
    base: Chain, name: str, url: str, key: str, *, ca: Path | None = None, own_venv: bool = False
) -> Iterator[Chain]:
    """Another endpoint of ``base``'s account, for the gateway at ``url``; started. ``own_venv``: one is made for it."""
    made = replace(base, name=name, configured={})
    key_file = base.account.home / ".config" / f"{name}.key"
    write_private(key_file, key + "\n")
    base.account.own(key_file)
    try:
        ended = made.cli(
            "configure", name, "--url", url, "--key-file", str(key_file), "--heartbeat", "5", "--json",
            *_vouched(base.account, ca), *(() if own_venv else ("--venv", str(made.venv))),
        )  # fmt: skip
        made.configured = json.loads(ended.stdout)
        made.start()
        yield made
    finally:
        made.cli("stop", name, check=False)


@contextmanager
def multi_user(base: Chain, url: str, key: str) -> Iterator[Chain]:
    """Beside ``base``'s endpoint one of root's, which maps every caller to ``base``'s account; started."""
    home = base.folder / "operator"
    home.mkdir(mode=0o700)
    made = replace(base, operator=Account("root", 0, 0, home), configured={})
    mapping = home / "mapping.json"
    rule = {"source": "{username}", "match": "(.*)@example.org", "output": base.account.name}
    mapping.write_text(json.dumps([{"DATA_TYPE": "expression_identity_mapping#1.0.0", "mappings": [rule]}]))
    mapped_home = base.account.folder(base.folder / "mapped")
    folder = base.account.folder(mapped_home / ".config/gateway-plugin")
    base.account.own(folder.parent)
    write_private(folder / "endpoint.key", key + "\n")
    base.account.own(folder / "endpoint.key")
    try:
        ended = made.cli(
            "configure", NAME, "--url", url, "--venv", str(made.venv), "--heartbeat", "5", "--multi-user",
            "--identity-mapping", str(mapping), "--contact", "ops@example.org",
            "--shared-folder", str(base.folder / "shared"), "--json",
        )  # fmt: skip
        made.configured = json.loads(ended.stdout)
        # The tests' user has no home of its own on a real machine.
        with (made.state / "endpoints/globus" / NAME / "user_environment.yaml").open("a") as stream:
            stream.write(f"HOME: {mapped_home}\n")
        made.start()
        yield made
    finally:
        made.cli("stop", NAME, check=False)


def _end_watchers() -> None:
    """The SDK's threads outlive their executors, and would search for a broker that is gone."""
    if "globus_compute_sdk" in sys.modules:
        from globus_compute_sdk.sdk import executor

        watchers = tuple(executor._RESULT_WATCHERS.values())
        for watcher in watchers:
            watcher.shutdown(cancel_futures=True)
        for watcher in watchers:
            watcher.join(15)


def _until_it_answers(made: Chain, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            made.counts()
            return
        except OSError:
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
