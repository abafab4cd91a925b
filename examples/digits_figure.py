"""The figure of the two-digits experiment: curves, accuracy, time and conflicts on one page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from examples.digits_data import TASKS
from examples.digits_experiment import Experiment
from examples.digits_runs import FAST, LOOP, PLAIN

# Okabe-Ito colours, and a line style each: readable without colour vision and in print.
COLOURS = {PLAIN: "#555555", LOOP: "#E69F00", FAST: "#0072B2"}
# Width, style, order: the slow loop is a wide line under the narrow one of fastpcgrad, so that both are seen.
LINES = {PLAIN: (1.2, ":", 3), LOOP: (5.0, "-", 1), FAST: (1.6, "-", 2)}
SMOOTHING_STEPS = 15
SMALLEST_DRAWN = 1e-8  # equal losses, which a logarithm cannot show


def draw(experiment: Experiment, path: Path) -> None:
    """Write the figure. A ``Figure`` of its own, not pyplot's: it needs neither a display nor a backend."""
    figure = Figure(figsize=(16, 8.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    samples, *curves = upper.subplots(1, 1 + len(TASKS), width_ratios=(0.62, 1, 1, 1))
    accuracy, step_time, difference, cosine = lower.subplots(1, 4, width_ratios=(1.25, 0.9, 1.1, 1.2))
    for t, task in enumerate(TASKS):
        _loss_curves(curves[t], experiment, t, task)
    curves[0].set_ylabel("cross-entropy")
    curves[0].legend(frameon=False)
    _accuracy(accuracy, experiment)
    _step_time(step_time, experiment)
    _difference(difference, experiment)
    _cosines(cosine, experiment)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    _samples(samples, experiment)
    figure.suptitle(
        "Two overlapping handwritten digits, three tasks, one network: the same training three times",
        fontsize=15,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _samples(axes: Axes, experiment: Experiment) -> None:
    """Six test images in one panel, each with its two digits above it."""
    across, down, pitch = 2, 3, 1.25
    for k in range(across * down):
        left, right, _ = experiment.test.labels[k].tolist()
        x, y = k % across * pitch, (down - 1 - k // across) * pitch
        axes.imshow(experiment.test.images[k].numpy(), cmap="gray", extent=(x, x + 1, y, y + 1))
        axes.text(x + 0.5, y + 1.04, f"{left} and {right}", ha="center", va="bottom", fontsize=9)
    axes.set(title="test images", xlim=(0, across * pitch - 0.25), ylim=(0, down * pitch))
    axes.axis("off")


def _loss_curves(axes: Axes, experiment: Experiment, t: int, task: str) -> None:
    window = max(1, min(SMOOTHING_STEPS, experiment.settings.steps // 8))
    for name, run in experiment.runs.items():
        curve = np.array(run.losses)[:, t]
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        width, style, order = LINES[name]
        steps = np.arange(len(smooth)) + window
        axes.plot(steps, smooth, style, color=COLOURS[name], linewidth=width, zorder=order, label=name)
    axes.set(title=f"training loss: {task}", xlabel=f"step (mean of the last {window})", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _accuracy(axes: Axes, experiment: Experiment) -> None:
    width = 0.27
    for position, (name, run) in enumerate(experiment.runs.items()):
        places = np.arange(len(TASKS)) + (position - 1) * width
        bars = axes.bar(places, [100 * a for a in run.accuracy], width * 0.94, color=COLOURS[name], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(TASKS)), list(TASKS))
    axes.set(title="test accuracy", ylabel="%", ylim=(0, 109))


def _step_time(axes: Axes, experiment: Experiment) -> None:
    milliseconds = [1000 * experiment.step_median(name) for name in experiment.runs]
    bars = axes.bar(list(experiment.runs), milliseconds, 0.7, color=[COLOURS[name] for name in experiment.runs])
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set(title="time of a step", ylabel="ms, median", ylim=(0, 1.12 * max(milliseconds)))


def _difference(axes: Axes, experiment: Experiment) -> None:
    loop, fast, exact = experiment.runs[LOOP], experiment.runs[FAST], experiment.exact
    for one, other, colour in ((loop, fast, "#333333"), (fast, exact, COLOURS[FAST])):
        gap = np.maximum(experiment.gap(one, other).numpy(), SMALLEST_DRAWN)
        label = f"{one.name}, {other.name}"
        axes.plot(np.arange(1, len(gap) + 1), gap, ".-", color=colour, lw=0.8, markersize=2, label=label)
    axes.set(title="loss difference between two runs", xlabel="step", yscale="log", ylim=(None, 10))
    axes.set_ylabel(f"largest of the tasks (0 drawn at {SMALLEST_DRAWN:g})")
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _cosines(axes: Axes, experiment: Experiment) -> None:
    cosines = experiment.cosines()
    mean = cosines.mean(0).numpy()
    conflicts = (cosines < 0).double().mean(0).numpy()
    np.fill_diagonal(mean, np.nan)
    limit = float(np.nanmax(np.abs(mean)))
    axes.set_facecolor("0.88")
    image = axes.imshow(mean, cmap="PuOr", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(TASKS)), list(TASKS))
    axes.set_yticks(range(len(TASKS)), list(TASKS), rotation=90, va="center")
    for row, column in zip(*np.nonzero(~np.isnan(mean)), strict=True):
        strong = abs(mean[row, column]) > 0.6 * limit
        text = f"{mean[row, column]:+.3f}\n{conflicts[row, column]:.0%} of steps\nin conflict"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
    axes.set_title("mean cosine of the task gradients")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
