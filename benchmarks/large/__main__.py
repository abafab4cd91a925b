"""``python -m benchmarks.large [--quick] [--only step|memory] [--threads 2] [--append]``

A GPT-style transformer of 1 M to 1 G parameters, T = 2, 4 and 8 tasks, in every mode of the library:

- *step*: whole training steps in turn (``benchmarks.large.steps``), against T plain forward and backward passes.
- *memory*: peaks beyond model and activations in fresh processes (``benchmarks.large.memory``). What is predicted not
  to fit is skipped, and its row says so.

Rows go to benchmarks/results/large.jsonl with ``--append`` alone; ``python -m benchmarks.large.plot`` draws them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import rows
from benchmarks.large import cases, memory, steps, targets
from benchmarks.measure import Plan
from benchmarks.rows import Row
from benchmarks.run import Session, show_targets

RESULTS = rows.ROOT / "benchmarks" / "results" / "large.jsonl"
QUICK, FULL = Plan(1.0, least=3, most=5, cold=60.0), Plan(6.0, least=7, most=40, slow=1.0, slow_least=3, cold=60.0)


def measure(session: Session, parts: Sequence[str]) -> list[Row]:
    measured: list[Row] = []
    timed = cases.timed_cases(session.quick) if "step" in parts else []
    with session.progress("steps", len(timed)) as starts:
        for case in timed:
            starts(case.label)
            measured += steps.rows(case, session.environment, QUICK if session.quick else FULL)
    peaks = cases.memory_cases(session.quick) if "memory" in parts else []
    with session.progress("memory", len(peaks)) as starts:
        for case in peaks:
            starts(case.label)
            measured += memory.rows(case, session.environment)
    return measured


def show(console: Console, measured: Sequence[Row]) -> None:
    table = Table("case", "mode", title="large models: fp32, whole step and peak", box=box.SIMPLE_HEAD)
    for column in ("rounds", "step ms", "/ plain", "merge()", "peak MB", "/ T·N·itemsize"):
        table.add_column(column, justify="right")
    for row in measured:
        table.add_row(f"{row.kind} {row.case}", escape(row.subject), *(_cells(row) if row.ok else [escape(row.status)]))
    console.print(table)


def _cells(row: Row) -> list[str]:
    if row.peak_bytes is not None:
        return ["", "", "", "", f"{row.peak_bytes / 1e6:.1f}", f"{row.peak_ratio:.3f}"]
    plain, share = row.whole_ratios.get("plain"), row.ratios.get(steps.WHOLE)
    return [
        str(row.rounds),
        f"{row.whole_p50_ms:.1f}",
        "" if plain is None else f"{plain:.3f}",
        "" if share is None else f"{share:.1%}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description="Measure large models.")
    parser.add_argument("--quick", action="store_true", help="10 M parameters at most, few rounds: about a minute")
    parser.add_argument("--only", choices=("step", "memory"), help="one part alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--append", action="store_true", help="append the rows to the results file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --append writes")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    # A peer's warnings would be printed into the progress bar; they change no number.
    warnings.filterwarnings("ignore", category=UserWarning)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    session = Session(rows.environment(options.threads), options.quick, console)
    console.print(session.environment)
    started = time.monotonic()
    measured = measure(session, [options.only] if options.only else ["step", "memory"])
    show(console, measured)
    show_targets(console, measured, targets.TARGETS)
    if options.append:
        rows.append(measured, options.results)
        console.print(f"{len(measured)} rows appended to {options.results}")
    console.print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
