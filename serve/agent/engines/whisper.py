"""faster-whisper-server (PyPI; CTranslate2): an ASGI application, on uvicorn and a Unix socket. Plain HTTP, no key.

Its own command has no option for a Unix socket. It reads ``FWS_MODEL_NAME`` (api.py, models.py of version 0.0.3), and
``FWS_BATCH_SIZE``, which an entry's ``env`` may set; ``args`` are uvicorn's.
"""

from __future__ import annotations

from serve.agent.engines.start import Start


def argv(start: Start) -> tuple[str, ...]:
    """The command line. It serves its one model under every name."""
    return (
        *("env", f"FWS_MODEL_NAME={start.name}"),
        start.python,
        *("-m", "uvicorn", "faster_whisper_server.api:app"),
        *("--uds", start.bind.socket),
        "--no-access-log",
        *start.model.args,
    )
