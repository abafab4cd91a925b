"""``python -m docs.figures.methods_plane``: what each method makes of two conflicting task gradients in the plane.

Writes docs/figures/methods_plane.png. Needs matplotlib. A method that needs more than two tasks has no panel; one that
draws random numbers is drawn many times.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Wedge

from benchmarks import method_cases

IMAGE = Path(__file__).with_suffix(".png")
GRADIENTS = torch.tensor([[1.6, 0.2], [-0.75, 0.6]], dtype=torch.float64)
COLOURS = ("#0072b2", "#e69f00")  # Okabe and Ito's, which the colour-blind tell apart too
MERGED = "#d55e00"
DRAWS = 64
COLUMNS = 5
LIMIT = 1.9


def results(name: str) -> torch.Tensor:
    """The merged gradients of several calls of a new method each: ``[draws, 2]``."""
    return torch.stack([method_cases.aggregate(method_cases.ours(name, 2), GRADIENTS) for _ in range(DRAWS)])


def no_conflict() -> tuple[float, float]:
    """The angles in degrees between which a vector has a negative product with neither gradient."""
    angles = torch.rad2deg(torch.atan2(GRADIENTS[:, 1], GRADIENTS[:, 0]))
    return float(angles.max() - 90), float(angles.min() + 90)


def draw(axes: Axes, name: str) -> None:
    axes.add_patch(Wedge((0, 0), 10, *no_conflict(), color="#e9f2e4", zorder=0))
    for gradient, colour in zip(GRADIENTS.tolist(), COLOURS, strict=True):
        arrow(axes, gradient, colour, width=2.0, alpha=0.9)
    found = results(name)
    distinct = torch.unique(found.round(decimals=6), dim=0)
    for merged in distinct.tolist():
        arrow(axes, merged, MERGED, width=2.6 if len(distinct) == 1 else 1.0, alpha=1.0 if len(distinct) < 4 else 0.35)
    longest = float(found.norm(dim=1).max())
    axes.set_title(name + (f"  (drawn at ×{LIMIT / longest:.2g})" if longest > LIMIT else ""), fontsize=10)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-0.3, 1.75), aspect="equal", xticks=[], yticks=[])
    axes.axhline(0, color="#cccccc", linewidth=0.5, zorder=1)
    axes.axvline(0, color="#cccccc", linewidth=0.5, zorder=1)


def arrow(axes: Axes, end: list[float], colour: str, width: float, alpha: float) -> None:
    length = math.hypot(*end)
    if length < 1e-9:
        axes.plot(0, 0, "o", color=colour, zorder=3)
        return
    shrunk = min(1.0, LIMIT / length)
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "alpha": alpha, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(end[0] * shrunk, end[1] * shrunk), xytext=(0, 0), arrowprops=style, zorder=3)


def main() -> None:
    torch.manual_seed(0)
    names = method_cases.names(tasks=2)
    lines = -(-len(names) // COLUMNS)
    figure, grid = plt.subplots(lines, COLUMNS, figsize=(2.5 * COLUMNS, 1.5 * lines + 0.5), squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        draw(axes, name)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=COLOURS[0], linewidth=2, label="task gradient $g_1$"),
        Line2D([], [], color=COLOURS[1], linewidth=2, label="task gradient $g_2$"),
        Line2D([], [], color=MERGED, linewidth=2, label="merged gradient"),
        Patch(color="#e9f2e4", label="no conflict with either task"),
    ]
    free = lines * COLUMNS - len(names)
    if free > 1:  # beside the last panels there is room for it
        figure.legend(
            handles=handles,
            loc="lower right",
            ncols=2,
            frameon=False,
            bbox_to_anchor=(0.98, 0.4 / figure.get_figheight()),
        )
        figure.tight_layout()
    else:
        figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(IMAGE, dpi=150)
    print(IMAGE)


if __name__ == "__main__":
    main()
