"""``python -m fastpcgrad demo``: where gradient surgery helps, where it does not, and what a step costs."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch

from .. import methods
from ..surgery import GradientSurgery
from .demo_problems import PROBLEMS
from .timing import in_turn

SEEDS, QUICK_SEEDS, QUICK_STEPS = 8, 2, 5
SECONDS = 5.0
"""For the time of a step, for each problem."""

FIRST = "losses / first values"
"""The sum in which each loss is divided by its value at the first step: scaled by hand, without a search."""
SEARCHED = "best weights of 4"
"""Of the weightings tried by hand that with the lowest median: chosen by the very errors that are shown."""

METHODS: dict[str, Callable[[], methods.Method]] = {
    "PCGrad": lambda: methods.PCGrad(generator=torch.Generator().manual_seed(0)),
    "GradVac": lambda: methods.GradVac(generator=torch.Generator().manual_seed(0)),
    "MGDA": methods.MGDA,
    "CAGrad": methods.CAGrad,
    "IMTLG": methods.IMTLG,
    "NashMTL": methods.NashMTL,
    "FairGrad": methods.FairGrad,
    "AlignedMTL": methods.AlignedMTL,
    "UPGrad": methods.UPGrad,
    "DualProj": methods.DualProj,
    "ConFIG": methods.ConFIG,
}
"""Every method that weighs task gradients by how they conflict, with its defaults."""


@dataclass(frozen=True)
class Outcome:
    """What training by one rule came to: ``errors`` of the networks of seeds 0..S-1, and the time of a step of one."""

    problem: str
    rule: str
    errors: tuple[float, ...]
    milliseconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.errors)


class Training:
    """Networks of a problem, trained with Adam by a rule: the name of a method, of a weighting, or ``FIRST``."""

    def __init__(self, problem: str, rule: str, seeds: Sequence[int], steps: int) -> None:
        self.problem = PROBLEMS[problem](seeds)
        each = [list(network.parameters()) for network in self.problem.networks.each]
        self.adam = torch.optim.Adam(self.problem.networks.parameters(), self.problem.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, steps)
        self.surgery = self.weights = None
        if rule in METHODS:
            tasks = len(self.problem.weightings["plain sum"])
            self.surgery = GradientSurgery(
                self.adam, tasks, METHODS[rule](), granularity=each, process_group="local"
            )  # a surgery for each network, all in one pass
        elif rule != FIRST:
            self.weights = torch.tensor(self.problem.weightings[rule])[:, None]

    def step(self) -> None:
        losses = self.problem.losses()
        self.adam.zero_grad()
        if self.surgery is not None:
            self.surgery.backward(losses.sum(dim=1))
        else:
            if self.weights is None:
                self.weights = 1 / losses.detach()
            (self.weights * losses).sum().backward()
        self.adam.step()
        self.schedule.step()


def train(problem: str, rule: str, seeds: Sequence[int], steps: int | None = None) -> tuple[float, ...]:
    """The errors of the networks of these seeds; ``steps`` of None: the problem's own."""
    torch.set_num_threads(1)
    steps = steps or PROBLEMS[problem].steps
    training = Training(problem, rule, seeds, steps)
    for _ in range(steps):
        training.step()
    return tuple(training.problem.errors().tolist())


def rules(problem: str) -> list[str]:
    """The sums, then the methods."""
    return [*PROBLEMS[problem].weightings, FIRST, *METHODS]


def by_rule(outcomes: Sequence[Outcome], problem: str) -> dict[str, Outcome]:
    """A problem's outcomes, and as ``SEARCHED`` that of its weightings with the lowest median: chosen afterwards."""
    found = {outcome.rule: outcome for outcome in outcomes if outcome.problem == problem}
    best = min((found[rule] for rule in PROBLEMS[problem].weightings), key=lambda outcome: outcome.median)
    return found | {SEARCHED: replace(best, rule=SEARCHED)}


def winners(found: Mapping[str, Outcome], rule: str) -> list[str]:
    """The methods that beat a rule beyond the error bars: their worst seed is better than its best."""
    return [method for method in METHODS if max(found[method].errors) < min(found[rule].errors)]


def show(out: Path, quick: bool = False) -> list[Outcome]:
    """Train, print the table as it grows, and draw the figure.

    Args:
        out: the folder of the figure, ``demo.png``.
        quick: few seeds and steps in this process: whether it runs, not who wins.
    Returns:
        the outcome of each problem and rule.
    Raises:
        SystemExit: scikit-learn is missing.
    """
    if find_spec("sklearn") is None:
        raise SystemExit("the demo's digits come with scikit-learn, which is missing: pip install scikit-learn")
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # so small networks have no work for two
    try:
        outcomes = _all_outcomes(range(QUICK_SEEDS if quick else SEEDS), QUICK_STEPS if quick else None)
    finally:
        torch.set_num_threads(threads)
    for problem in PROBLEMS:
        print(f"\n{PROBLEMS[problem].title}:", *_finding(by_rule(outcomes, problem)), sep="\n")
    if find_spec("matplotlib") is None:
        print("\nNo figure: matplotlib is missing (pip install matplotlib).")
    else:
        from .demo_figure import draw

        out.mkdir(parents=True, exist_ok=True)
        draw(outcomes, out / "demo.png")
        print(f"\nFigure: {out / 'demo.png'}")
    print(f"All of it took {time.perf_counter() - start:.0f} s.")
    return outcomes


def _all_outcomes(seeds: Sequence[int], steps: int | None) -> list[Outcome]:
    """Of each problem and rule, printed as they come: from a process for each core, or quickly from this one."""
    quick = steps is not None
    times = {problem: _milliseconds(problem, 0.0 if quick else SECONDS) for problem in PROBLEMS}
    jobs = [(problem, rule) for problem in PROBLEMS for rule in rules(problem)]
    outcomes = []
    with ExitStack() as stack:
        run: Callable[..., Iterator[tuple[float, ...]]] = map
        if not quick:
            workers = min(os.cpu_count() or 1, len(jobs))
            run = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn"))).map
        trained = run(train, *zip(*jobs, strict=True), repeat(seeds), repeat(steps))
        for (problem, rule), errors in zip(jobs, trained, strict=True):
            if rule == rules(problem)[0]:
                print(_heading(problem, len(seeds), steps))
            outcomes.append(Outcome(problem, rule, errors, times[problem][rule]))
            print(_line(outcomes[-1]), flush=True)
    return outcomes


def _milliseconds(problem: str, seconds: float) -> dict[str, float]:
    """The processor's time for a step of one network by each rule, in turn: others disturb it less than the clock's."""
    trainings = {rule: Training(problem, rule, (0,), PROBLEMS[problem].steps) for rule in rules(problem)}
    times = in_turn({rule: training.step for rule, training in trainings.items()}, seconds, "cpu", time.thread_time)
    return {rule: 1e3 * taken for rule, taken in times.items()}


def _heading(problem: str, seeds: int, steps: int | None) -> str:
    about = PROBLEMS[problem]
    return (
        f"\n{about.title}; {seeds} seeds, {steps or about.steps} steps\n"
        f"{about.error + ', %':<36}{'median':>9}{'lowest':>9}{'highest':>9}{'ms a step':>12}"
    )


def _line(outcome: Outcome) -> str:
    values = (outcome.median, min(outcome.errors), max(outcome.errors))
    return f"{outcome.rule:<36}" + "".join(f"{100 * v:>9.3g}" for v in values) + f"{outcome.milliseconds:>12.2f}"


def _finding(found: Mapping[str, Outcome]) -> Iterator[str]:
    """Which methods beat the sums, each in a line, from the numbers alone."""
    for rule in ("plain sum", FIRST, SEARCHED):
        names = ", ".join(winners(found, rule)) or "none"
        yield f'  better in every seed than any seed of the sum "{rule}": {names}'
