"""Gradient surgery on two overlapping handwritten digits: ``python -m examples.multidigits``.

Trains one network on three tasks (left digit, right digit, is the left one larger) three times from the same
weights, on the same batches, with the same random task orders: with the plain sum of the losses, with PCGrad
as a Python loop, and with ``fastpcgrad.PCGrad`` in its place. Prints what each cost and reached; draws it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from examples import command_line

if TYPE_CHECKING:
    from examples.digits_experiment import Experiment

SUMMARY = "Train on two overlapping handwritten digits without surgery, with the slow loop and with fastpcgrad."
NEEDED = ("sklearn", "rich", "matplotlib")
QUICK = {"epochs": 3, "train_size": 1280, "test_size": 500, "batch": 64, "width": 256}


def main(arguments: list[str] | None = None) -> Experiment:
    """Run the demo; returns what was measured."""
    options = _options(arguments)
    command_line.exit_if_missing(NEEDED)
    # Imported only now, so that a missing package is answered by the line above.
    import torch
    from rich.console import Console

    from examples import digits_console, digits_figure
    from examples.digits_experiment import Experiment
    from examples.digits_runs import Settings

    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed, **(QUICK if options.quick else {}))
    if options.epochs:
        settings = replace(settings, epochs=options.epochs)
    console = Console()
    experiment = Experiment.prepare(settings)
    digits_console.introduce(console, experiment)
    digits_console.train(console, experiment)
    console.print(digits_console.table(experiment))
    digits_console.explain(console, experiment)
    figure = options.out / "multidigits.png"
    digits_figure.draw(experiment, figure)
    seconds = time.perf_counter() - start
    console.print(f"Figure: [bold]{figure}[/]. All of it took {seconds:.0f} s.", soft_wrap=True)
    return experiment


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("multidigits", SUMMARY, seeded="data, weights, batches, task orders")
    parser.add_argument(
        "--epochs", type=command_line.positive, help="passes over the training images (10; 3 with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="a small network, few steps: a look in seconds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
