"""``python -m gateway_plugin.blocks.leave``: the last call of a block's job that an earlier version wrote.

Those jobs are shell scripts; one may run, or wait in a queue, across the upgrade. This module and ``run_folder`` are
there for one version: to be removed in 0.2.0.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from gateway_plugin.blocks.cleanup import clean_up


def main(argv: list[str] | None = None) -> int:
    """Command line: ``--records FOLDER --block NAME --folder FOLDER``. Exit code 1 if something could not be ended."""
    parser = argparse.ArgumentParser(prog="leave", description="End what runs in a block.")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--block", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="Ray's temporary folder of this block")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second cancel must not interrupt it
    return 0 if clean_up(given.records, given.block, given.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
