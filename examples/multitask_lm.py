"""Gradient surgery on a language model: ``python -m examples.multitask_lm``.

Trains a small GPT on three texts (Python, English, drawn digits) twice from the same weights on the same batches:
with the plain sum of the losses, and with surgery on task gradients that come one task at a time, in micro-batches,
through activation checkpoints, into rows of bfloat16. A training that was interrupted continues with ``--resume`` and
gives the numbers that it would have given. Prints what each reached; draws losses and conflicts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples import command_line

if TYPE_CHECKING:
    from examples.lm_runs import Run, Settings

SUMMARY = "Train a small language model on three texts, without and with gradient surgery."
NEEDED = ("sklearn", "rich", "matplotlib")
QUICK: dict[str, Any] = {"steps": 24, "save_every": 5, "learning_rate": 4e-3, "warm_up_steps": 4}
QUICK_MODEL = {"context": 32, "width": 32, "layers": 2, "heads": 2}


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    """Train both; returns the runs by their names."""
    options = _options(arguments)
    command_line.exit_if_missing(NEEDED)
    # The cores may be shared: a thread that waits for another must sleep, not spin. Read when torch loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported only now, so that a missing package is answered by the line above.
    import torch
    from rich.console import Console

    from examples import lm_console, lm_figure, lm_text
    from examples.lm_runs import PLAIN, SURGERY, Run

    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    texts, settings = lm_text.load(), _settings(options)
    checkpoints = {name: options.out / f"{name.replace(' ', '-')}.pt" for name in (PLAIN, SURGERY)}
    runs = {name: Run(name, settings, texts) for name in checkpoints}
    for name, path in checkpoints.items():
        if options.resume and path.exists():
            try:
                runs[name].load(torch.load(path))
            except ValueError as error:
                sys.exit(f"cannot resume from {path}: {error}")
    console = Console()
    lm_console.introduce(console, runs)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        lm_console.train(console, runs, checkpoints)
    except KeyboardInterrupt:
        console.print("Interrupted: the same command with [bold]--resume[/] continues from the last checkpoint.")
        sys.exit(130)
    console.print(lm_console.table(runs))
    lm_console.explain(console)
    figure = options.out / "multitask_lm.png"
    lm_figure.draw(runs, figure)
    seconds = time.perf_counter() - start
    console.print(f"Figure: [bold]{figure}[/]. All of it took {seconds:.0f} s.", soft_wrap=True)
    return runs


def _settings(options: argparse.Namespace) -> Settings:
    from examples.lm_model import ModelConfig
    from examples.lm_runs import Settings

    settings = Settings(seed=options.seed, threads=options.threads)
    if options.quick:
        settings = replace(settings, model=ModelConfig(**QUICK_MODEL), **QUICK)
    return replace(settings, steps=options.steps) if options.steps else settings


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("multitask_lm", SUMMARY, seeded="weights, batches, task orders")
    parser.set_defaults(out=Path("demo-output/multitask_lm"))  # checkpoints too
    parser.add_argument(
        "--steps", type=command_line.positive, help="optimizer steps in each run (160; 24 with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps: a look in seconds")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in the output folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
