"""``python -m fastpcgrad config|doctor|demo|bench``: what is installed, is it right, what is it good for, how fast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .backends.config import show_config
from .commands import bench, demo, doctor


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        the exit status: 1 where ``doctor`` found something wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m fastpcgrad", description="Gradient surgery for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("config", help="versions and backends, and why one is missing")
    commands.add_parser("doctor", help="what is installed, which backend runs, and a self-test of ten seconds")
    shown = commands.add_parser("demo", help="a few minutes: where surgery helps, where not, and what a step costs")
    shown.add_argument("--out", type=Path, default=Path("demo-output"), help="figure folder (%(default)s)")
    shown.add_argument("--quick", action="store_true", help="few seeds and steps: whether it runs, not who wins")
    measured = commands.add_parser("bench", help="ten seconds against a Python loop and, where installed, TorchJD")
    measured.add_argument("--columns", type=int, default=bench.COLUMNS, help="parameters, N (%(default)s)")
    measured.add_argument("--device", default="cpu", help="of the task gradients (%(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "config":
        show_config()
        return 0
    if options.command == "doctor":
        return doctor.examine()
    if options.command == "demo":
        demo.show(options.out, options.quick)
        return 0
    bench.compare(options.columns, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
