"""One fetch as a program: ``python -m gateway_plugin.fetch_process org/name REVISION FOLDER``. For the controller.

Prints a line of JSON for each progress, ``{"done_bytes", "total_bytes"}``, and ``{"error"}`` if it fails. Ends when its
standard input does: what came stays, for the next one. The token is the hub's own login or ``HF_TOKEN``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from gateway_plugin.errors import GatewayError
from gateway_plugin.fetching import Progress, fetch


def main() -> int:
    """Entry point: 0 when the weights are there, 1 when they could not be fetched."""
    repository, revision, folder = sys.argv[1:]
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        fetch(repository, revision, Path(folder), progress=_tell)
    except GatewayError as error:
        _print({"error": error.message})
        return 1
    except OSError as error:
        _print({"error": f"{error.filename or folder}: {error.strerror or error}"})
        return 1
    return 0


def _tell(progress: Progress) -> None:
    _print({"done_bytes": progress.done_bytes, "total_bytes": progress.total_bytes})


def _print(document: dict[str, object]) -> None:
    print(json.dumps(document), flush=True)


def _end_with_input() -> None:
    while os.read(0, 4096):  # not by sys.stdin: its lock would be held at the interpreter's end
        continue
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
