"""Deploy the Serve application on the running head, then exit: a short-lived driver of the supervisor.

Ray keeps the application from then on, also over a restart of the head; if it is there, this does nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

from gateway_plugin.paths import Layout
from gateway_plugin.service.deployment import noted

APPLICATION = "gateway"
NAMESPACE = "gateway"
_KEPT_BY_SERVE = frozenset({"RUNNING", "DEPLOYING", "UNHEALTHY"})
"""States in which Serve itself recovers the application; deploying again would replace every replica."""


def main() -> int:
    """Entry point: exit code 0 when the application is deployed or Serve recovers it."""
    parser = argparse.ArgumentParser(prog="gateway-deploy")
    parser.add_argument("--state", type=Path, required=True)
    layout = Layout.of(parser.parse_args().state)
    gateway = noted(layout)

    import ray
    from ray import serve as ray_serve

    ray.init(address=gateway.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
    found = _application_state(ray_serve)
    if found in _KEPT_BY_SERVE:
        _say(f"application is {found}: nothing to do")
        return 0
    _say(f"application is {found}: deploying")
    ray_serve.start(proxy_location="Disabled")  # the edge comes straight to the replicas' sockets
    application = importlib.import_module("serve.app").build({"state": str(layout.state)})
    ray_serve.run(application, name=APPLICATION, route_prefix=None, blocking=False)
    _say("application is running")
    return 0


def _application_state(ray_serve: Any) -> str:
    application = ray_serve.status().applications.get(APPLICATION)
    return "ABSENT" if application is None else str(application.status.value)


def _say(words: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), words, flush=True)


if __name__ == "__main__":
    sys.exit(main())
