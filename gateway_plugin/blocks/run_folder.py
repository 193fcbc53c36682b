"""Make this node's run folder and print its path, for a block's script (``-m gateway_plugin.blocks.run_folder``).

The script cannot spell the path itself: on a node where another user sits on the name, the next one is taken.
"""

from __future__ import annotations

import sys

from gateway_plugin.errors import GatewayError
from gateway_plugin.ownership import private_folder
from gateway_plugin.paths import Layout, default_state_root


def main() -> int:
    """Entry point: exit code 73 (as ``EX_CANTCREAT``) and one line on stderr if there is no folder to be had."""
    try:
        print(private_folder(Layout.of(default_state_root()).run))
    except GatewayError as error:
        print(error.message, file=sys.stderr)
        return 73
    return 0


if __name__ == "__main__":
    sys.exit(main())
