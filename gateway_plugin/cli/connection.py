"""The client that a command uses: of the gateway in ``--state``, else of ``GATEWAY_URL``, else of the local one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gateway_plugin.cli.output import settings

if TYPE_CHECKING:
    from gateway_plugin.client import Client


@contextmanager
def connect() -> Iterator[Client]:
    """A client, closed at the end. What ``openai`` raises becomes a ``GatewayError``."""
    from openai import OpenAIError

    from gateway_plugin.client import Client, gateway_error

    chosen = settings()
    with Client(state=chosen.state if chosen.explicit_state else None) as client:
        try:
            yield client
        except OpenAIError as error:
            raise gateway_error(error, client.url) from error
