"""What the two-digits experiment says in the terminal: progress, the table, and how to read it."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from examples.digits_data import TASKS
from examples.digits_experiment import Experiment
from examples.digits_runs import FAST, LOOP, Run
from fastpcgrad.backends.config import backend_in_use


def introduce(console: Console, experiment: Experiment) -> None:
    train, test, settings = experiment.train, experiment.test, experiment.settings
    shared = sum(parameter.numel() for parameter in experiment.untrained.trunk.parameters())
    console.print(
        f"{len(train)} training images from {train.sources.unique().numel()} handwritten digits, "
        f"{len(test)} test images from {test.sources.unique().numel()} others; {shared / 1e6:.2f} M shared "
        f"parameters, batches of {settings.batch}, {settings.steps} steps with Adam in each run; fastpcgrad's backend: "
        f"{backend_in_use()}.",
        soft_wrap=True,
    )


def train(console: Console, experiment: Experiment) -> None:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[milliseconds]:7.1f} ms a step, loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console) as progress:
        settings = experiment.settings
        lengths = dict.fromkeys(experiment.runs, settings.steps)
        lengths[experiment.exact.name] = min(settings.checked_steps, settings.steps)
        bars = {
            name: progress.add_task(name, total=length, milliseconds=0.0, loss=0.0) for name, length in lengths.items()
        }

        def advance(run: Run) -> None:
            milliseconds, loss = 1000 * statistics.fmean(run.step_seconds), sum(run.losses[-1])
            progress.update(bars[run.name], advance=1, milliseconds=milliseconds, loss=loss)

        experiment.train_all(advance)


def table(experiment: Experiment) -> Table:
    runs = experiment.runs
    steps = {name: experiment.step_median(name) for name in runs}
    backwards = {name: experiment.backward_median(name) for name in runs}
    floor = experiment.floor_median()
    rows = Table("", title="Same weights, same batches, same task orders")
    for name in runs:
        rows.add_column(name, justify="right")
    for t, task in enumerate(TASKS):
        rows.add_row(f"test accuracy: {task}", *(f"{run.accuracy[t]:.1%}" for run in runs.values()))
    rows.add_section()
    rows.add_row("all steps", *(f"{sum(run.step_seconds):.1f} s" for run in runs.values()))
    rows.add_row("step, median", *(f"{1000 * step:.1f} ms" for step in steps.values()))
    rows.add_row("of it pc_backward, median", *(f"{1000 * backward:.1f} ms" for backward in backwards.values()))
    rows.add_row(
        f"over {len(TASKS)} plain backwards, {1000 * floor:.1f} ms",
        *(f"{backward / floor:.2f}x" for backward in backwards.values()),
    )
    rows.add_row("step, speed-up over slow loop", *(f"{steps[LOOP] / step:.1f}x" for step in steps.values()))
    return rows


def explain(console: Console, experiment: Experiment) -> None:
    loop, fast, exact = experiment.runs[LOOP], experiment.runs[FAST], experiment.exact
    gap, checked = experiment.gap(loop, fast), len(exact.losses)
    conflicts = experiment.pair_conflicts()
    removed = ", ".join(f"{share:.2%}" for share in experiment.removed_fractions())
    console.print(
        f"Losses of slow loop and fastpcgrad differ by at most {gap[:checked].max():.1e} in the first {checked} "
        f"steps and by {gap.max():.1e} over all {len(gap)}. That is rounding, which training amplifies. From the "
        f"slow loop with float64 arithmetic, in those first {checked} steps, fastpcgrad differs by "
        f"[bold]{experiment.gap(fast, exact).max():.1e}[/] and the slow loop by "
        f"[bold]{experiment.gap(loop, exact).max():.1e}[/].\n"
        f"Conflicts: {conflicts.double().mean():.0%} of the task pairs had opposing gradients; "
        f"at least one pair in {conflicts.any(1).double().mean():.0%} of the steps. "
        f"Surgery shortened the task gradients by {removed} on average.\n"
        "Compared: the plain run minimises the sum of the losses; PCGrad's default averages shared gradients "
        "over the tasks, a constant factor that Adam removes. One seed: accuracy gaps of a point are noise.",
        soft_wrap=True,
    )
