"""The figure of ``python -m fastpcgrad demo``: the errors of all seeds, by rule, of both problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .demo import FIRST, METHODS, SEARCHED, Outcome, by_rule, winners
from .demo_problems import PROBLEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUM, SURGERY = "0.35", "#0072b2"
"""Of the colours that the colour-blind tell apart."""


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the figure of the outcomes of all problems."""
    from matplotlib.figure import Figure

    first, second = (by_rule(outcomes, problem) for problem in PROBLEMS)
    methods = sorted(METHODS, key=lambda rule: first[rule].median)  # one order, that of the first problem
    rules = ["plain sum", FIRST, SEARCHED, *methods]
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, problem, found in zip((left, right), PROBLEMS, (first, second), strict=True):
        _panel(axes, [found[rule] for rule in rules])
        axes.set_title(f"{PROBLEMS[problem].title}\n{_finding(found)}", fontsize=10, loc="left", pad=22)
    left.set_yticks(range(len(rules)), [rule if rule in METHODS else f"sum: {rule}" for rule in rules])
    left.set(xscale="log", xlabel=f"{PROBLEMS['poisson'].error}, % (log scale: each label is ten times the last)")
    left.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel=f"{PROBLEMS['digits'].error}, %")
    right.set_xlim(left=0)
    figure.suptitle(_headline(first, second), fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(
        f"Circle: one of {len(first[FIRST].errors)} seeds, the same for all. Line: lowest to highest seed. Bar: "
        "median. Best weights of 4: chosen by this very error.\nEvery method that weighs by conflict is shown, with "
        "its defaults. ms: processor time for one network, on one thread.",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=110)


def _headline(first: dict[str, Outcome], second: dict[str, Outcome]) -> str:
    saving = len(winners(first, FIRST))
    if saving and not winners(second, "plain sum"):
        share = f"{saving} of {len(METHODS)} methods"
        return f"Losses a thousandfold apart: {share} save the search for weights. Losses of one kind: none gains"
    return "Gradient surgery beside sums of losses"


def _finding(found: dict[str, Outcome]) -> str:
    hand, plain, band = (len(winners(found, rule)) or "none" for rule in (FIRST, "plain sum", SEARCHED))
    return (
        f"worst seed better than the best of losses / first values: {hand} of {len(METHODS)} methods;\n"
        f"of the plain sum: {plain}; of the best weights of 4 (grey band): {band}"
    )


def _panel(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """A row for each outcome, the first on top, with its median and the time of a step written beside it."""
    best = next(outcome for outcome in outcomes if outcome.rule == SEARCHED)
    axes.axvspan(100 * min(best.errors), 100 * max(best.errors), color="0.9", zorder=0)
    for place, outcome in enumerate(outcomes):
        colour = SURGERY if outcome.rule in METHODS else SUM
        percent = [100 * error for error in outcome.errors]
        axes.plot([min(percent), max(percent)], [place, place], color=colour, linewidth=1.2)
        axes.plot(percent, [place] * len(percent), "o", color=colour, markersize=4, fillstyle="none")
        axes.plot([100 * outcome.median], [place], "|", color=colour, markersize=16, markeredgewidth=3)
        _beside(axes, place, f"{_two_digits(100 * outcome.median)} %", f"{outcome.milliseconds:.1f} ms", colour)
    _beside(axes, -1, "median", "a step", "black")
    axes.axhline(2.5, color="0.7", linewidth=0.8)
    axes.set_ylim(len(outcomes) - 0.5, -0.6)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def _beside(axes: Axes, place: int, median: str, step: str, colour: str) -> None:
    """Two columns of text to the right of a row."""
    for column, text in ((1.13, median), (1.26, step)):
        axes.text(column, place, text, transform=axes.get_yaxis_transform(), ha="right", va="center", color=colour)


def _two_digits(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 10 else f"{percent:#.2g}"
