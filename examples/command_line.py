"""What the examples' commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def parser(module: str, summary: str, seeded: str) -> argparse.ArgumentParser:
    """Options of ``python -m examples.<module>``; ``seeded`` says of what the seed is."""
    made = argparse.ArgumentParser(prog=f"python -m examples.{module}", description=summary)
    made.add_argument("--out", type=Path, default=Path("demo-output"), help="figure folder (%(default)s)")
    made.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help=f"of {seeded} (%(default)s)")
    return made


def trainer_options(
    argv: Sequence[str] | None,
    module: str,
    summary: str,
    *,
    seeded: str,
    needed: Sequence[str],
    extras: str,
    **length: int,
) -> argparse.Namespace:
    """What ``python -m examples.<module>`` is told, which trains a small model in a trainer; see ``exit_if_missing``.

    Args:
        argv: its arguments; None: of this process.
        module, summary, seeded: see ``parser``.
        needed, extras: of ``exit_if_missing``.
        length: the name of the option that says how long it trains, and its default.
    """
    made = parser(module, summary, seeded)
    for name, default in length.items():
        made.add_argument(f"--{name}", type=positive, default=default, help=f"training {name} (%(default)s)")
    made.set_defaults(threads=1)  # so small a model has no work for two
    options = made.parse_args(argv)
    exit_if_missing(needed, extras)
    return options


def torchrun_parser(module: str, summary: str, steps: int) -> argparse.ArgumentParser:
    """Options of ``torchrun -m examples.<module>``, which trains for so many steps."""
    made = argparse.ArgumentParser(prog=f"torchrun -m examples.{module}", description=summary)
    made.add_argument("--steps", type=positive, default=steps, help="training steps (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of data, network and batches (%(default)s)")
    return made


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def exit_if_missing(packages: Sequence[str], extras: str = "examples") -> None:
    """End the process with a line that says how to install what is missing, if anything is."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}. Install with: pip install 'fastpcgrad[{extras}]'")
