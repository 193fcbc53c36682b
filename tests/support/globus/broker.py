"""A RabbitMQ of the tests' own: one node on loopback, in a folder of its own, without systemd, as any user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pika
import pika.exceptions

from tests.support.globus.account import Account, end

_PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

_CONFIGURATION = """\
listeners.tcp.local = 127.0.0.1:{port}
vm_memory_high_watermark.absolute = 256MB
disk_free_limit.absolute = 50MB
log.file.level = warning
"""


def missing() -> str | None:
    """Why there can be no broker here; ``None``: there can."""
    if _PROGRAM.exists() and shutil.which("epmd"):
        return None
    return "RabbitMQ is not installed here: run 'make test-globus' as root, or install Debian's rabbitmq-server"


class Broker:
    """RabbitMQ and the port mapper (epmd) that Erlang wants beside it."""

    def __init__(self, account: Account, port: int, distribution_port: int, mapper_port: int) -> None:
        self._account = account
        self._folder = account.folder(account.home / "rmq")
        self._port = port
        self._mapper_port = mapper_port
        self._server: subprocess.Popen[bytes] | None = None
        self._mapper: subprocess.Popen[bytes] | None = None
        for name in ("mnesia", "log", "conf"):
            account.folder(self._folder / name)
        (self._folder / "conf/rabbitmq.conf").write_text(_CONFIGURATION.format(port=port))
        (self._folder / "conf/enabled_plugins").write_text("[].")
        self._environment = account.environment(
            HOME=str(self._folder),
            LANG="C.UTF-8",
            LC_ALL="C.UTF-8",
            RABBITMQ_NODENAME="gateway@localhost",
            RABBITMQ_NODE_IP_ADDRESS="127.0.0.1",
            RABBITMQ_NODE_PORT=str(port),
            RABBITMQ_DIST_PORT=str(distribution_port),
            ERL_EPMD_PORT=str(mapper_port),
            ERL_EPMD_ADDRESS="127.0.0.1",
            RABBITMQ_MNESIA_BASE=str(self._folder / "mnesia"),
            RABBITMQ_LOG_BASE=str(self._folder / "log"),
            RABBITMQ_PID_FILE=str(self._folder / "pid"),
            RABBITMQ_CONFIG_FILE=str(self._folder / "conf/rabbitmq"),
            RABBITMQ_CONF_ENV_FILE=str(self._folder / "conf/env.conf"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(self._folder / "conf/enabled_plugins"),
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        )

    @property
    def url(self) -> str:
        """For AMQP clients."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}/%2F"

    def start(self, within_s: float = 60.0) -> None:
        """Start it and wait until it takes connections."""
        log = (self._folder / "log/out").open("ab")
        with log:
            # Started by ourselves, so that it ends with us: the one that Erlang starts stays behind.
            self._mapper = self._mapper or self._account.popen(
                ["epmd", "-address", "127.0.0.1", "-port", str(self._mapper_port)], log, self._environment
            )
            self._server = self._account.popen([_PROGRAM], log, self._environment)
        deadline = time.monotonic() + within_s
        while not self._answers():
            assert self._server.poll() is None, f"RabbitMQ ended: {(self._folder / 'log/out').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"RabbitMQ did not answer within {within_s} s"
            time.sleep(0.1)

    def kill(self) -> None:
        """``kill -9``: what was not on disk is lost."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None

    def stop(self) -> None:
        """End both."""
        for child in (self._server, self._mapper):
            if child is not None:
                end(child)
        self._server = self._mapper = None

    def _answers(self) -> bool:
        try:
            pika.BlockingConnection(pika.URLParameters(self.url)).close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True
