"""``python -m benchmarks.run [--quick] [--only PART] [--threads 2] [--append] [-- OPTIONS OF PYTEST]``

Parts, each with the minutes that it may take; without ``--only`` the first three:

- *kernel*: ops on a packed J, by pytest-benchmark (``benchmarks/test_kernels.py``).
- *step*: training steps against T plain backward passes (``benchmarks.steps``).
- *memory*: their peaks in fresh processes (``benchmarks.memory``).
- *method*: every method against TorchJD's, by pytest-benchmark (``benchmarks/test_methods.py``).
- *many*: weights of 64 to 1,024 tasks, with peaks, against TorchJD's (``benchmarks.many_tasks``).
- *gradnorm*: a step of GradNorm (``benchmarks.gradnorm``).
- *factored*: steps and a peak with factored rows, where they pay and where they do not.
- *floor*: steps below T backward passes: over width and batch, peaks over T, one loss a sample, tables for lookups.
- *large*: steps and peaks of a GPT-style transformer of 1 M to 1 G parameters in every mode of the library. What is
  predicted not to fit is skipped, and its row says so.

Rows go to benchmarks/results with ``--append`` alone; without it they are only shown. pytest's own options choose among
the calls and keep what pytest-benchmark saves: ``-- -k gram --benchmark-autosave``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, gradnorm, many_tasks, memory, rows, samples, saved, steps, tables, targets
from benchmarks.rows import RESULTS, ROOT
from benchmarks.session import Run
from benchmarks.timing import Clock

Measure = Callable[[Run, float, Sequence[str]], bool]
"""Of a run, the minutes that it may take, and pytest's options; whether nobody was wrong or failed."""


@dataclass(frozen=True)
class Part:
    """``results``: the name of the file that its rows belong to."""

    results: str
    minutes: float
    measure: Measure


def calls(file: str) -> Measure:
    """What pytest-benchmark measures of a file, in a process of its own."""

    def measure(run: Run, minutes: float, options: Sequence[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [
                sys.executable, "-m", "pytest", "-q", f"benchmarks/{file}", "--benchmark-only",
                "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={report}",
                "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",  # where nothing could be measured
                f"--threads={run.environment.threads}", f"--minutes={minutes}", *options,
            ]  # fmt: skip
            done = subprocess.run([*command, "--quick"] if run.quick else command, cwd=ROOT, check=False)
            if report.exists():
                run.add(saved.rows(json.loads(report.read_text(encoding="utf-8")), run.environment))
        return done.returncode == 0

    return measure


def here(measure: Callable[[Run], object]) -> Measure:
    """What is measured in this process, until the time is up."""

    def measured(run: Run, minutes: float, options: Sequence[str]) -> bool:
        before = len(run.rows)
        run.allow(minutes)
        measure(run)
        return not any(row.status.startswith(("wrong", "failed")) for row in run.rows[before:])

    return measured


def large(run: Run) -> None:
    steps.measure(run, cases.large_cases(run.quick))
    memory.measure(run, cases.large_memory_cases(run.quick))


def factored(run: Run) -> None:
    steps.measure(run, cases.factored_cases(run.quick))
    memory.measure(run, cases.factored_memory_cases(run.quick))


def floor(run: Run) -> None:
    samples.measure(run, samples.cases(run.quick))
    steps.measure(run, cases.floor_cases(run.quick))
    memory.measure(run, cases.floor_memory_cases(run.quick))


PARTS = {
    "kernel": Part("cpu", 6.0, calls("test_kernels.py")),
    "step": Part("steps", 3.5, here(lambda run: steps.measure(run, cases.step_cases(run.quick)))),
    "memory": Part("memory", 8.0, here(lambda run: memory.measure(run, cases.memory_cases(run.quick)))),
    "method": Part("methods", 7.0, calls("test_methods.py")),
    "many": Part("many", 25.0, here(many_tasks.measure)),
    "gradnorm": Part("gradnorm", 2.0, here(lambda run: gradnorm.measure(run, gradnorm.cases(run.quick)))),
    "factored": Part("factored", 8.0, here(factored)),
    "floor": Part("floor", 15.0, here(floor)),
    "large": Part("large", 8.5, here(large)),
}
DEFAULT = ("kernel", "step", "memory")


def show(run: Run) -> None:
    """What the pages would say of these rows, what was promised, and what has no numbers."""
    of_many = [row for row in run.rows if row.op == many_tasks.OP]
    of_methods = [row for row in run.rows if row.kind == "method" and row.op != many_tasks.OP]
    others = [row for row in run.rows if row.kind != "method"]
    shown = [tables.cpu(others)] if others else []
    shown += [tables.gradnorm(others), tables.factored(others), tables.floor(others), tables.large_steps(others)]
    shown += [tables.methods(of_methods)] if of_methods else []
    shown += [many_tasks.table(of_many)] if of_many else []
    shown.append(tables.target_table(run.rows, (*targets.LARGE, *targets.FACTORED, *targets.FLOOR, *targets.GRADNORM)))
    print("\n" + "\n\n".join(part for part in shown if part) + "\n")
    run.show_failures()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part alone; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of steps, for one thread on a machine that others use")
    parser.add_argument("--append", action="store_true", help="append the rows to the results files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder where --append writes")
    parser.add_argument("pytest", nargs="*", help="given to pytest")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)  # a peer's; they change no number
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        Clock.take_cpu_time()
    run = Run(rows.environment(options.threads), quick=options.quick)
    print(run.environment, flush=True)
    started, good = time.monotonic(), True
    for name in options.only or DEFAULT:
        part = PARTS[name]
        run.results = options.results / f"{part.results}.jsonl" if options.append else None
        good &= part.measure(run, part.minutes, options.pytest)
    show(run)
    print(f"{time.monotonic() - started:.0f} s")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
