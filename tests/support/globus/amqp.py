"""The stand-in's one connection to RabbitMQ: a thread that owns it, and reconnects when the broker restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pika
import pika.exceptions

_LOST = (pika.exceptions.AMQPError, OSError)

Channel = Any
"""pika's BlockingChannel; pika has no type stubs."""


class Amqp(threading.Thread):
    """Consumes the service's own queues, and runs calls of other threads on its channel."""

    def __init__(self, url: str, consumers: Mapping[str, Callable[[Channel, bytes], None]]) -> None:
        """``consumers``: topic exchange -> the handler of its messages."""
        super().__init__(daemon=True, name="amqp")
        self.url = url
        self._consumers = consumers
        self._connection: Any = None
        self._channel: Channel = None
        self.ready = threading.Event()

    def run(self) -> None:
        """For ever."""
        while True:
            try:
                self._connect()
                self._channel.start_consuming()
            except _LOST:
                self.ready.clear()
                time.sleep(0.1)

    def _connect(self) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(self.url + "?heartbeat=0"))
        self._channel = channel = self._connection.channel()
        channel.confirm_delivery()  # a publish returns when the broker has it on disk
        for exchange, consume in self._consumers.items():
            channel.exchange_declare(exchange, "topic", durable=True)
            channel.queue_declare(f"svc.{exchange}", durable=True)
            channel.queue_bind(f"svc.{exchange}", exchange, "#")
            channel.basic_consume(f"svc.{exchange}", self._acknowledged(consume))
        self.ready.set()

    @staticmethod
    def _acknowledged(consume: Callable[[Channel, bytes], None]) -> Callable[[Channel, Any, Any, bytes], None]:
        def take(channel: Channel, method: Any, _: Any, body: bytes) -> None:
            consume(channel, body)
            channel.basic_ack(method.delivery_tag)

        return take

    def call(self, work: Callable[[Channel], None], within_s: float = 60.0) -> None:
        """Run ``work`` on the channel; again on the next one if the connection breaks. Raises what it raises."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                if not self.ready.wait(1.0):
                    raise TimeoutError("no connection")
                self._try(work)
                return
            except (TimeoutError, *_LOST):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _try(self, work: Callable[[Channel], None]) -> None:
        done, failed = threading.Event(), []
        connection = self._connection

        def run() -> None:
            try:
                work(self._channel)
            except BaseException as error:  # noqa: BLE001  # it goes to the caller
                failed.append(error)
            done.set()

        connection.add_callback_threadsafe(run)
        while not done.wait(0.2):
            if self._connection is not connection or not connection.is_open:
                raise TimeoutError("the broker went away")
        if failed:
            raise failed[0]
