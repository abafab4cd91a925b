"""The figure of the language model's training: each task's loss in both runs, and how the tasks conflicted."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.lm_runs import PLAIN, SURGERY, Run

# Okabe-Ito colours, and a line style each: readable without colour vision and in print.
LINES = {PLAIN: ("#555555", ":"), SURGERY: ("#0072B2", "-")}
PAIRS = (("#E69F00", "-"), ("#009E73", "--"), ("#CC79A7", "-."))
SMOOTHING_STEPS = 15


def draw(runs: dict[str, Run], path: Path) -> None:
    """Write the figure. A ``Figure`` of its own, not pyplot's: it needs neither a display nor a backend."""
    texts = list(runs[SURGERY].texts)
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    *curves, conflict = figure.subplots(1, len(texts) + 1)
    for t, axes in enumerate(curves):
        _losses(axes, runs, t, texts[t])
    curves[0].set_ylabel("bits a byte")
    curves[0].legend(frameon=False)
    _cosines(conflict, runs[SURGERY], texts)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("One small GPT, three texts: the same training without and with gradient surgery", fontsize=15)
    figure.savefig(path, dpi=120)


def _losses(axes: Axes, runs: dict[str, Run], t: int, text: str) -> None:
    for name, run in runs.items():
        colour, style = LINES[name]
        axes.plot(*_smooth(np.array(run.losses)[:, t]), style, color=colour, label=name)
    axes.set(title=f"training loss: {text}", xlabel="step")


def _cosines(axes: Axes, run: Run, texts: list[str]) -> None:
    """Each pair's cosine: every step faint, the mean over some steps on top."""
    cosines = torch.stack(run.cosines).numpy()
    for (i, j), (colour, style) in zip(combinations(range(len(texts)), 2), PAIRS, strict=True):
        axes.plot(np.arange(1, len(cosines) + 1), cosines[:, i, j], color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(*_smooth(cosines[:, i, j]), style, color=colour, label=f"{texts[i]}, {texts[j]}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="cosine of two task gradients", xlabel="step")
    axes.legend(frameon=False)


def _smooth(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean over the last few; fewer where the training is short."""
    window = max(1, min(SMOOTHING_STEPS, len(curve) // 8))
    mean = np.convolve(curve, np.ones(window) / window, mode="valid")
    return np.arange(len(mean)) + window, mean
