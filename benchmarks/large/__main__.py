"""``python -m benchmarks.large [--quick] [--only step|memory] [--threads 2] [--append]``

A GPT-style transformer of 1 M to 1 G parameters, T = 2, 4 and 8 tasks, in every mode of the library:

- *step*: whole training steps in turn (``benchmarks.large.steps``), against T plain forward and backward passes.
- *memory*: peaks beyond model and activations in fresh processes (``benchmarks.large.memory``). What is predicted not
  to fit is skipped, and its row says so.

Rows go to benchmarks/results/large.jsonl with ``--append`` alone; ``python -m benchmarks.large.plot`` draws them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.large import RESULTS, cases, memory, steps, targets
from benchmarks.large.modes import WHOLE, mode_named
from benchmarks.measure import Plan
from benchmarks.rows import Row
from benchmarks.run import show_targets
from benchmarks.session import Session, command

QUICK, FULL = Plan(1.0, least=3, most=5, cold=60.0), Plan(1.5, least=5, most=40, slow=1.0, slow_least=3, cold=60.0)
MINUTES = 8.5
"""After these what is left is skipped, and the rows say so."""


def measure(session: Session, parts: Sequence[str]) -> list[Row]:
    measured: list[Row] = []
    session.allow(MINUTES)

    def late() -> bool:
        return session.late

    timed = cases.timed_cases(session.quick) if "step" in parts else []
    with session.progress("steps", len(timed)) as starts:
        for case in timed:
            starts(case.label)
            measured += steps.rows(case, session.environment, QUICK if session.quick else FULL, late)
    peaks = cases.memory_cases(session.quick) if "memory" in parts else []
    sizes = {case.size: [other.tasks for other in peaks if other.size == case.size] for case in peaks}
    with session.progress("memory", len(sizes)) as starts:
        for size, tasks in sizes.items():
            starts(f"{size.name}, T = {tasks}")
            measured += memory.rows(size, tasks, session.environment, late)
    return measured


def show(console: Console, measured: Sequence[Row]) -> None:
    timed = Table("case", "mode", title="whole step, fp32", box=box.SIMPLE_HEAD)
    for column in ("rounds", "p50 ms", "/ plain passes", "merge()"):
        timed.add_column(column, justify="right")
    peaks = Table("case", "mode", title="peak beyond model and activations", box=box.SIMPLE_HEAD)
    for column in ("MB", "/ T·N·itemsize"):
        peaks.add_column(column, justify="right")
    for row in measured:
        if row.whole_p50_ms is not None:
            floor, share = row.whole_ratios.get(mode_named(row.subject).floor), row.ratios.get(WHOLE)
            timed.add_row(
                row.case,
                escape(row.subject),
                str(row.rounds),
                f"{row.whole_p50_ms:.1f}",
                "" if floor is None else f"{floor:.3f}",
                "" if share is None else f"{share:.1%}",
            )
        if row.peak_bytes is not None:
            peaks.add_row(row.case, escape(row.subject), f"{row.peak_bytes / 1e6:.1f}", f"{row.peak_ratio:.3f}")
    for table in (timed, peaks):
        console.print(table)
    for row in measured:
        if not row.ok:
            console.print(f"{row.kind} {row.case} {row.subject}: {row.status}", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("large", "Measure large models.", "10 M parameters at most, few rounds: about a minute", RESULTS)
    parser.add_argument("--only", choices=("step", "memory"), help="one part alone")
    options = parser.parse_args(arguments)

    # A peer's warnings would be printed into the progress bar; they change no number.
    warnings.filterwarnings("ignore", category=UserWarning)
    session = Session.begin(options, columns=160)
    console = session.console
    started = time.monotonic()
    measured = measure(session, [options.only] if options.only else ["step", "memory"])
    show(console, measured)
    show_targets(console, measured, targets.TARGETS)
    session.keep(measured, options)
    console.print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
