"""GradNorm's toy problem: ``python -m examples.gradnorm_toy``.

T regression tasks y_i = σ_i tanh(x (B + ε_i)) share one trunk; their scales σ_i lie between 1 and 100, so that the
squared errors lie four orders of magnitude apart. Trains with equal weights and with GradNorm (Chen et al. 2018,
arXiv:1711.02257), from the same network, on the same batches, for T = 2 and T = 10; draws the normalised losses
L_i / L_i(0) and the weights.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from examples import command_line
from fastpcgrad.gradnorm import gradNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table

SUMMARY = "Train GradNorm's toy problem with equal weights and with GradNorm."
NEEDED = ("rich", "matplotlib")
TASK_COUNTS = (2, 10)
FEATURES, WIDTH, LABELS, SAMPLES, BATCH = 250, 100, 100, 10_000, 100
QUICK_STEPS = 40
ALPHA, NETWORK_LR, WEIGHTS_LR = 0.12, 2e-5, 7e-4
EQUAL, GRADNORM = "equal weights", "GradNorm"


class ToyNet(nn.Module):
    """Four ReLU layers that all tasks share and a linear head each; gives the T mean squared errors ``[T]``."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        widths = [FEATURES, WIDTH, WIDTH, WIDTH, WIDTH]
        self.trunk = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.trunk += nn.Sequential(nn.Linear(before, after), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(WIDTH, LABELS) for _ in range(tasks))

    @property
    def last_shared(self) -> nn.Module:
        """W: the last layer before the heads."""
        return self.trunk[-2]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shared = self.trunk(x)
        return torch.stack([nn.functional.mse_loss(head(shared), y[:, t]) for t, head in enumerate(self.heads)])


@dataclass(frozen=True)
class Run:
    """One training; ``weights`` and ``losses`` (normalised) are ``[steps, T]``."""

    name: str
    weights: NDArray[Any]
    losses: NDArray[Any]
    seconds: float

    @property
    def tasks(self) -> int:
        return self.losses.shape[1]

    @property
    def spread(self) -> float:
        """Largest less smallest normalised loss, the mean over all steps: 0 where all tasks learn at one rate."""
        return float((self.losses.max(axis=1) - self.losses.min(axis=1)).mean())

    @property
    def final(self) -> float:
        """Mean normalised loss over the tasks and the last twentieth of the steps."""
        return float(self.losses[-max(1, len(self.losses) // 20) :].mean())


def scales(tasks: int) -> Tensor:
    """σ: from 1 to 100 in equal ratios."""
    return torch.logspace(0, 2, tasks)


def toy_data(tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, 250]`` from U(0, 1) and targets ``[n, T, 100]``; B and ε_i have deviations 10 and 3.5."""
    common = 10 * torch.randn(FEATURES, LABELS, generator=generator)
    own = 3.5 * torch.randn(tasks, FEATURES, LABELS, generator=generator)
    x = torch.rand(SAMPLES, FEATURES, generator=generator)
    targets = [scale * (x @ (common + matrix)).tanh() for scale, matrix in zip(scales(tasks), own, strict=True)]
    return x, torch.stack(targets, dim=1)


def train(name: str, batches: Iterator[tuple[Tensor, Tensor]], tasks: int, seed: int) -> Run:
    torch.manual_seed(seed)
    net = ToyNet(tasks)
    start = time.perf_counter()
    # Weights that do not learn stay equal.
    lr2 = WEIGHTS_LR if name == GRADNORM else 0.0
    weights, losses = gradNorm(net, net.last_shared, ALPHA, batches, 1, NETWORK_LR, lr2, log=True)
    return Run(name, weights, losses, time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the demo; returns the runs."""
    options = _options(arguments)
    command_line.exit_if_missing(NEEDED)
    from rich.console import Console

    torch.set_num_threads(options.threads)
    console = Console()
    runs = _train_all(console, options.steps, options.seed)
    console.print(_table(runs))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("losses", _losses_figure(runs)), ("weights", _weights_figure(runs))):
        path = options.out / f"gradnorm_{name}.png"
        figure.savefig(path, dpi=120)
        console.print(f"Figure: [bold]{path}[/]", soft_wrap=True)
    console.print(
        "A loss above 1 is worse than at the start: with equal weights the gradients of large tasks swamp the small "
        "ones in the shared layers. GradNorm brings the rates closer while they differ. Both runs end near the same "
        "losses. One seed.",
        soft_wrap=True,
    )
    return runs


def _train_all(console: Console, steps: int, seed: int) -> list[Run]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=console) as progress:
        for tasks in TASK_COUNTS:
            generator = torch.Generator().manual_seed(seed)
            x, y = toy_data(tasks, generator)
            chosen = torch.randint(SAMPLES, (steps, BATCH), generator=generator)
            for name in (EQUAL, GRADNORM):
                label = f"T={tasks}, {name}"
                batches = ((x[rows], y[rows]) for rows in progress.track(chosen, description=label))
                runs.append(train(name, batches, tasks, seed))
    return runs


def _table(runs: list[Run]) -> Table:
    from rich.table import Table

    table = Table("", title="The same network and batches", caption="losses: over their values at the start")
    for run in runs:
        table.add_column(f"T={run.tasks}\n{run.name}", justify="right")
    table.add_row("spread of the losses, mean over steps", *(f"{run.spread:.3f}" for run in runs))
    table.add_row("largest loss of any step", *(f"{run.losses.max():.2f}" for run in runs))
    table.add_row("loss at the end, mean over tasks", *(f"{run.final:.3f}" for run in runs))
    table.add_row(
        "smallest and largest weight", *(f"{run.weights[-1].min():.3f} {run.weights[-1].max():.2f}" for run in runs)
    )
    table.add_row("time of a step", *(f"{1000 * run.seconds / len(run.losses):.1f} ms" for run in runs))
    return table


def _losses_figure(runs: list[Run]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(len(TASK_COUNTS), 2, sharex=True, sharey=True).flat
    for axes, run in zip(panels, runs, strict=True):
        axes.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
        _curves(axes, run.losses, run.tasks)
        axes.set(title=f"T={run.tasks}, {run.name}", yscale="log", ylabel="L / L(0)", xlabel="step")
        axes.legend(frameon=False, fontsize=8, ncols=2, title="scale σ")
    figure.suptitle("Normalised task losses: the closer the curves, the more alike the rates")
    return figure


def _weights_figure(runs: list[Run]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    learned = [run for run in runs if run.name == GRADNORM]
    for axes, run in zip(figure.subplots(1, len(learned)), learned, strict=True):
        axes.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
        _curves(axes, run.weights, run.tasks)
        axes.set(title=f"T={run.tasks}: the weights sum to {run.tasks}", ylabel="weight", xlabel="step")
        axes.legend(frameon=False, fontsize=8, ncols=2, title="scale σ")
    figure.suptitle("GradNorm's weights")
    return figure


def _curves(axes: Any, values: NDArray[Any], tasks: int) -> None:
    from matplotlib import colormaps

    for t, scale in enumerate(scales(tasks).tolist()):
        colour = colormaps["viridis"](0.9 * t / (tasks - 1))
        axes.plot(range(1, len(values) + 1), values[:, t], color=colour, linewidth=1, label=f"{scale:.3g}")
    axes.spines[["top", "right"]].set_visible(False)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("gradnorm_toy", SUMMARY, seeded="data, weights, batches")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=command_line.positive, default=1200, help="of each run (%(default)s)")
    quick = f"{QUICK_STEPS} steps: a look in seconds"
    length.add_argument("--quick", dest="steps", action="store_const", const=QUICK_STEPS, help=quick)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
