"""Ray's traffic over TLS, in both directions: the environment that enables it, and the certificate that it needs.

Ray's gRPC servers demand a certificate of Ray's authority, and its clients reject a server without one before they send
anything: a process that takes one of Ray's ports first receives no token. The files lie on the node's own disk, since
Ray reads them again for every connection.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout, write_private


def tls_environment(folder: Path) -> dict[str, str]:
    """The environment for every process of one Ray node: the paths in ``folder`` of certificate, key and authority."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        "RAY_TLS_CA_CERT": str(folder / "authority.crt"),
    }


def before_ray_starts(parameters: Any, head: bool) -> None:
    """Called by ``ray start`` (``RAY_START_HOOK``) with its parameters, before it connects to anything.

    Makes this node's certificate, for the address that Ray was given. Also disables Ray's client server: it is an
    unused process of 100 MB, on a port (10001) that a second gateway would need too, and no option of ``ray start``
    disables it.
    """
    parameters.ray_client_server_port = None
    make_identity(Layout(Path(os.environ["GATEWAY_STATE"])), parameters.node_ip_address, os.environ)


def make_identity(layout: Layout, address: str, environment: Any) -> None:
    """Write the files that ``environment`` names (``tls_environment``), 0600 in a 0700 folder.

    Raises:
        ServiceError: the authority cannot be read, or the folder belongs to another user.
    """
    from gateway_plugin.tls import sign_for_ray  # not in blocks/host.py, which needs the names only

    certificate = Path(environment["RAY_TLS_SERVER_CERT"])
    private_folder(certificate.parent)
    sign_for_ray(layout, address, certificate, Path(environment["RAY_TLS_SERVER_KEY"]))
    write_private(Path(environment["RAY_TLS_CA_CERT"]), layout.ray_ca.read_bytes())
