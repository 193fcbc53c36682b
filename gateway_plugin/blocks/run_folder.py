"""``python -m gateway_plugin.blocks.run_folder``: make this node's run folder and print its path.

For jobs of blocks that an earlier version wrote; to be removed together with ``leave``, in 0.2.0.
"""

from __future__ import annotations

import sys

from gateway_plugin.errors import GatewayError
from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout, default_state_root


def main() -> int:
    """Exit code 73 (``EX_CANTCREAT``) and one line on stderr if there is no place for the folder."""
    try:
        print(private_folder(Layout.of(default_state_root()).run))
    except GatewayError as error:
        print(error.message, file=sys.stderr)
        return 73
    return 0


if __name__ == "__main__":
    sys.exit(main())
