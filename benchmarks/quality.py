"""``python -m benchmarks.quality [--quick] [--only PART] [--methods NAME] [--append]``: what networks come to.

Parts: each problem of ``benchmarks.quality_problems``, where every rule of ``benchmarks.quality_rules`` trains networks
of the same seeds with each learning rate; and *times*, a step of each rule in turn, which wants a quiet machine.

A cell, of one problem, rule and learning rate, is a row of benchmarks/results/quality.jsonl. What has one is not run
again: a run that was cut off goes on where it was, and a new method needs its own cells alone. Rows go there with
``--append`` alone; without it they are only shown, beside those that are there.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality_tables, rows
from benchmarks.quality_problems import PARTS, PROBLEMS, Budget
from benchmarks.quality_rules import ALONE, PLAIN, names, rule
from benchmarks.rows import RESULTS, Row
from benchmarks.session import Run
from fastpcgrad.commands.timing import in_turn

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
TIMES = "times"
SECONDS = 20.0
"""For the times of a problem's rules, in turn."""
FILE = "quality.jsonl"


class Training:
    """S networks of a problem for each learning rate, side by side in one model, by one rule."""

    def __init__(self, problem: str, by: str, rates: Sequence[float], seeds: Sequence[int], steps: int) -> None:
        self.problem = PROBLEMS[problem]([*seeds] * len(rates))
        self.rule = rule(by, self.problem)
        groups = []
        for place, rate in enumerate(rates):
            networks = range(place * len(seeds), (place + 1) * len(seeds))
            modules = [*self.problem.shared, *self.problem.own]
            parameters = [p for s in networks for p in (*(m.vectors[s] for m in modules), *self.rule.parameters[s])]
            groups.append({"params": parameters, "lr": rate})
        self.adam = torch.optim.Adam(groups)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, steps)

    def step(self) -> None:
        batch = self.problem.batch()
        losses = self.problem.losses(batch)
        self.adam.zero_grad()
        self.rule.backward(losses)
        self.adam.step()
        self.schedule.step()
        self.rule.after(batch)


Judged = Mapping[str, torch.Tensor]
"""By part ``[M, R, S]``: each measure of the networks of each learning rate and seed."""
FAILURES = ArithmeticError, ValueError, RuntimeError


def judged(problem: str, by: str, rates: Sequence[float], seeds: Sequence[int], steps: int) -> Judged:
    """What networks come to that are trained side by side."""
    training = Training(problem, by, rates, seeds, steps)
    for _ in range(steps):
        training.step()
    with torch.no_grad():
        return {part: training.problem.judged(part).unflatten(1, (len(rates), len(seeds))) for part in PARTS}


def train(run: Run, problem: str, by: str, rates: Sequence[float]) -> list[Row]:
    """A cell for each learning rate; one by one where side by side is refused, or fails at one of them."""
    seeds, steps = PROBLEMS[problem].budget(run.quick)
    try:
        found = judged(problem, by, rates, range(seeds), steps)
    except FAILURES:
        return [_one_by_one(run, problem, by, rate) for rate in rates]
    return [_finished(run, problem, by, rate, {part: of[:, place] for part, of in found.items()})
            for place, rate in enumerate(rates)]  # fmt: skip


def _one_by_one(run: Run, problem: str, by: str, rate: float) -> Row:
    seeds, steps = PROBLEMS[problem].budget(run.quick)
    try:
        each = [judged(problem, by, [rate], [seed], steps) for seed in range(seeds)]
    except FAILURES as error:  # that there is no answer is a result
        return _cell(run, problem, by, rate, {"status": rows.failed(error)})
    return _finished(run, problem, by, rate, {part: torch.cat([one[part][:, 0] for one in each], 1) for part in PARTS})


def _finished(run: Run, problem: str, by: str, rate: float, found: Judged) -> Row:
    """Of ``[M, S]`` by part; of a single task its own measure alone."""
    about = PROBLEMS[problem]
    own = [place for place, task in enumerate(about.tasks) if ALONE + task == by] or range(len(about.measures))
    return _cell(
        run,
        problem,
        by,
        rate,
        {part: {about.measures[m].name: of[m].tolist() for m in own} for part, of in found.items()},
    )


def _cell(run: Run, problem: str, by: str, rate: float, fields: Mapping[str, Any]) -> Row:
    tasks, steps = len(PROBLEMS[problem].tasks), PROBLEMS[problem].budget(run.quick).steps
    return run.row("training", problem, "quality", by, T=tasks, learning_rate=rate, steps=steps, **fields)


def missing(known: Iterable[Row], problem: str, by: str, budget: Budget) -> list[float]:
    """The learning rates of which there is no finished cell."""
    done = {cell for cell, row in quality_tables.cells(known, problem, budget).items() if row.ok}
    return [rate for rate in RATES if (by, rate) not in done]


def measure_times(run: Run, problem: str, seconds: float) -> None:
    """The processor's time for a step of one network by each rule, in turn: others disturb it less than the clock's."""
    by_rule = {
        by: Training(problem, by, RATES[:1], (0,), PROBLEMS[problem].steps)
        for by in names(PROBLEMS[problem])
        if not by.startswith(ALONE) and (by == PLAIN or by not in PROBLEMS[problem].weightings)
    }
    taken = in_turn({by: training.step for by, training in by_rule.items()}, seconds, "cpu", time.thread_time)
    tasks, note = len(PROBLEMS[problem].tasks), "CPU time of a step of one network"
    run.add(
        run.row(
            "step", problem, "quality", by, T=tasks, p50_ms=1e3 * step, ratios={PLAIN: step / taken[PLAIN]}, note=note
        )
        for by, step in taken.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few seeds and steps: whether it runs, not who wins")
    parser.add_argument("--only", choices=[*PROBLEMS, TIMES], action="append", help="one part alone; may be repeated")
    parser.add_argument("--methods", action="append", help="one rule alone, by its name; may be repeated")
    parser.add_argument("--append", action="store_true", help="append the rows to the results file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results file")
    options = parser.parse_args(arguments)
    every = {by for problem in PROBLEMS.values() for by in names(problem)}
    if unknown := set(options.methods or ()) - every:
        parser.error(f"--methods must be among {', '.join(sorted(every))}; found {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore", category=UserWarning)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small networks have no work for two
    try:
        run = Run(rows.environment(1), quick=options.quick, results=options.results / FILE if options.append else None)
        known = rows.read(options.results / FILE)
        measure(run, known, options.only or [*PROBLEMS, TIMES], options.methods)
    finally:
        torch.set_num_threads(threads)
    print("\n" + quality_tables.page([*known, *run.rows], run.quick) + "\n")
    run.show_failures()
    return 0


def measure(run: Run, known: Sequence[Row], parts: Sequence[str], methods: Sequence[str] | None = None) -> None:
    """What is missing among known rows."""
    print(run.environment, flush=True)
    for problem in (part for part in parts if part != TIMES):
        for by in names(PROBLEMS[problem]):
            rates = missing(known, problem, by, PROBLEMS[problem].budget(run.quick))
            if rates and (methods is None or by in methods):
                run.starts(f"{problem}, {by}")
                run.add(train(run, problem, by, rates))
    if TIMES in parts:
        for problem in PROBLEMS:
            run.starts(f"{problem}, times")
            measure_times(run, problem, 0.0 if run.quick else SECONDS)


if __name__ == "__main__":
    sys.exit(main())
