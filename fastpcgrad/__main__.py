"""``python -m fastpcgrad config|doctor|bench``: what this installation can do, whether it does it, and how fast."""

from __future__ import annotations

import argparse
import sys

from .backends.config import show_config
from .commands import bench, doctor


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        the exit status: 1 where ``doctor`` found something wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m fastpcgrad", description="Gradient surgery for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("config", help="versions and backends, and why one is missing")
    commands.add_parser("doctor", help="what is installed, which backend runs, and a self-test of ten seconds")
    measured = commands.add_parser("bench", help="ten seconds against a Python loop and, where installed, TorchJD")
    measured.add_argument("--columns", type=int, default=bench.COLUMNS, help="parameters, N (%(default)s)")
    measured.add_argument("--device", default="cpu", help="of the task gradients (%(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "config":
        show_config()
        return 0
    if options.command == "doctor":
        return doctor.examine()
    bench.compare(options.columns, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
