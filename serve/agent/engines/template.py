"""``engine: command``: any program, by the template in its entry (``serve.agent.argv`` lists the placeholders)."""

from __future__ import annotations

import re

from gateway_plugin.adapters import PLACEHOLDER as ADAPTERS
from gateway_plugin.adapters import adapter_words
from serve.agent.engines.start import Start

_PLACEHOLDER = re.compile(r"\{(host|port|socket|model|name|source|revision|keyfile|certfile|cafile|python)\}")


def argv(start: Start) -> tuple[str, ...]:
    """The command line."""
    values = {
        "host": start.bind.host,
        "port": str(start.bind.port),
        "socket": start.bind.socket,
        "model": start.model.name,
        "name": start.model.name,
        "source": start.name,
        "revision": start.revision,
        "keyfile": str(start.tls.key),
        "certfile": str(start.tls.certificate),
        "cafile": str(start.tls.authority),
        "python": start.python,
    }
    words: list[str] = []
    for template in start.model.command:
        word = _PLACEHOLDER.sub(lambda found: values[found[1]], template)
        if ADAPTERS in template:
            words += [word.replace(ADAPTERS, adapter) for adapter in adapter_words(start.model.adapters)]
            continue
        words += [word.replace("{names}", name) for name in start.served] if "{names}" in template else [word]
    return (*words, *start.model.args)
