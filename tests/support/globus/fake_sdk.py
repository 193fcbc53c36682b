"""An environment with stand-ins for Globus's packages: the commands round them are tested without a service."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROMPT = "Enter the resulting Authorization Code here: "
_MODULES = {
    "globus_compute_endpoint/__init__.py": "",
    "globus_compute_endpoint/auth.py": f"""
import os, pathlib
TOKEN = pathlib.Path(os.environ["GLOBUS_COMPUTE_USER_DIR"]) / "token"

class App:
    def login_required(self):
        return not TOKEN.exists()

    def login(self):  # as globus_sdk's CommandLineLoginFlowManager
        print("Please authenticate with Globus here: https://auth.example.org/")
        code = input({PROMPT!r}).strip()
        if code != "right":
            raise ValueError(f"{{code}} is not a code")
        TOKEN.write_text(code)

def get_globus_app_with_scopes():
    return App()
""",
    "globus_compute_sdk/__init__.py": """
class Client:
    def __init__(self, app, do_version_check):
        print("printed by the SDK, and no answer")

    def get_endpoint_status(self, endpoint):
        return {"status": "online"}
""",
}
_PROGRAM = """#!/bin/sh
echo "$2" >> "$GLOBUS_COMPUTE_USER_DIR/starts"
test -e daemon.pid && { echo "it runs already"; exit 1; }
touch daemon.pid
exec sleep 600
"""


def make(folder: Path) -> Path:
    """The environment, in ``folder``; run it with ``environment(folder)``."""
    for name, text in _MODULES.items():
        path = folder / "sdk" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    programs = folder / "venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (programs / "globus-compute-endpoint").write_text(_PROGRAM)
    (programs / "globus-compute-endpoint").chmod(0o755)
    return folder / "venv"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command that finds the stand-ins, on a machine without a client's secret."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLOBUS_COMPUTE_")}
    return {**kept, "PYTHONPATH": str(folder / "sdk"), "TERM": "xterm"}
