"""What ``make demo-globus`` runs: a gateway with two real models, and around it everything that Globus Compute is.

A real RabbitMQ, the real endpoint, and a stand-in for the web service alone; then examples/globus_client.py, in an
environment that has the light client and nothing else. Ends with ``globus demo ok: ...`` and exit code 0, or says what
went wrong. Uses a state folder of its own (build/demo-globus, or $DEMO_STATE). Ctrl-C ends everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from examples.run_demo import ROOT, Demo, run_to_its_end, vllm_is_missing
from gateway_plugin.connection import known_url
from gateway_plugin.edge.keys import KeyStore
from tests.support.globus.chain import chain, missing

STATE = Path(os.environ.get("DEMO_STATE") or ROOT / "build" / "demo-globus").absolute()
CLIENT_VENV = ROOT / "build" / "globus-client-venv"
PINNED = ROOT / "requirements" / "globus-client.txt"


class GlobusDemo(Demo):
    """One run of it."""

    title = "globus demo"
    shows = "Globus Compute: broker, stand-in for the service, endpoint, and a client in another environment"

    def workflow(self) -> tuple[int, int]:
        """The chain, and the client on its other end. Returns its exit code and the switches."""
        python = self.client_venv()
        store = KeyStore(self.layout)
        if any(key.name == "globus" for key in store.list()):  # of a run that was cut off
            store.revoke("globus")
        key = store.create("globus", "endpoint")
        with chain(known_url(self.layout), key, ca=self.layout.ca) as made:
            made.start()
            self.screen.line("    endpoint online; from here on only Globus Compute leads to the models")
            environment = {
                **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
                "PATH": "/usr/bin:/bin",
                "PYTHONUNBUFFERED": "1",
                **made.service_environment,
                "GATEWAY_ENDPOINT": made.endpoint_id,
                "GATEWAY_FUNCTION": made.function_id,
            }
            return self.watched([str(python), str(ROOT / "examples" / "globus_client.py")], environment)

    def client_venv(self) -> Path:
        """Python of an environment with what a user of an endpoint installs: no Ray, no vLLM. Kept between runs."""
        python = CLIENT_VENV / "bin" / "python"
        self.screen.line(f"    client's environment: {CLIENT_VENV.relative_to(ROOT)} (gateway-plugin[globus])")
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(CLIENT_VENV)], check=True)
            subprocess.run([*pip, "-c", str(PINNED), f"{ROOT}[globus]"], check=True)
        subprocess.run([*pip, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
        return python


def main() -> int:
    """Returns the exit code."""
    if vllm_is_missing():
        return 69
    if (reason := missing()) is not None:
        print(f"{reason}. 'make demo' needs none of it.", file=sys.stderr)
        return 69
    return run_to_its_end(GlobusDemo(STATE))


if __name__ == "__main__":
    sys.exit(main())
