"""Conflicts as a figure and as a table: what ``ConflictReport`` and ``ConflictMonitor`` show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = ""
"""The layer that all parameters together are."""

_MOST_LABELS = 40
_HISTORY_PAIRS = 10


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """The T (T − 1) / 2 pairs i < j, in the order of ``triu_indices``."""
    return list(combinations(names, 2))


def table(names: Sequence[str], layers: Sequence[str], values: Mapping[str, Tensor]) -> pandas.DataFrame:
    """A row for each layer and pair of tasks.

    Args:
        values: columns by name, ``[layers, pairs]``.
    """
    import pandas

    pairs = pairs_of(names)
    columns: dict[str, list[Any]] = {
        "layer": [layer for layer in layers for _ in pairs],
        "task": [a for _ in layers for a, _ in pairs],
        "other": [b for _ in layers for _, b in pairs],
    }
    return pandas.DataFrame({**columns, **{name: found.flatten().tolist() for name, found in values.items()}})


def draw(
    names: Sequence[str],
    layers: Sequence[str],
    cosines: Tensor,
    rates: Tensor | None = None,
    history: Mapping[int, Tensor] | None = None,
    *,
    title: str,
) -> Figure:
    """The cosines of all pairs of tasks over all parameters, by layer where there are several, and over time.

    A ``Figure`` of its own, not pyplot's: it needs neither a display nor a backend.

    Args:
        names: of T tasks.
        layers: ``ALL`` first.
        cosines: ``[layers, T, T]`` on the host.
        rates: how often each pair conflicts, of the same shape; None: of a single look.
        history: the cosines of the pairs by step, ``[pairs]``.
    """
    from matplotlib.figure import Figure

    pairs, by_layer, over_time = pairs_of(names), len(layers) > 1 and len(names) > 1, bool(history) and len(names) > 1
    widths = [max(4.2, 0.9 * len(names) + 2.4)]
    widths += [min(14.0, max(4.6, 0.5 * (len(layers) - 1) + 2.6))] * by_layer + [5.4] * over_time
    height = max(4.4, 0.75 * len(names) + 2.2, (0.34 * len(pairs) + 2.4) * by_layer)
    height += 0.06 * max(map(len, [*names, *_without_common_start(layers[1:])[1]]))  # of labels that stand upright
    figure = Figure(figsize=(sum(widths), min(height, 14.0)), layout="constrained")
    axes = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    _tasks(axes.pop(0), names, cosines[0], None if rates is None else rates[0])
    if by_layer:
        shown = (cosines if rates is None else rates)[1:]
        _layers(axes.pop(0), pairs, layers[1:], shown, are_rates=rates is not None)
    if over_time and history is not None:
        _history(axes.pop(0), pairs, history)
    figure.suptitle(title)
    return figure


def _tasks(axes: Axes, names: Sequence[str], cosines: Tensor, rates: Tensor | None) -> None:
    shown = cosines.clone().fill_diagonal_(float("nan")).numpy()
    axes.set_facecolor("0.9")
    image = axes.imshow(shown, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    _label(axes, names, names)
    size = 9 if len(names) <= 8 else 6
    for i, j in ((i, j) for i in range(len(names)) for j in range(len(names)) if i != j):
        value = float(cosines[i, j])
        text = f"{value:+.2f}" + ("" if rates is None else f"\n({float(rates[i, j]):.0%})")
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    how_often = "" if rates is None else "\n(in brackets: how often below 0, a conflict)"
    title = "cosine of task gradients, all layers\nred: against each other   blue: together"
    axes.set_title(title + how_often, fontsize=10)
    _bar(axes, image, "cosine")


def _layers(
    axes: Axes, pairs: Sequence[tuple[str, str]], layers: Sequence[str], values: Tensor, *, are_rates: bool
) -> None:
    at = [(i, j) for i, j in combinations(range(values.shape[-1]), 2)]
    grid = [[float(layer[i, j]) for layer in values] for i, j in at]
    image = axes.imshow(grid, aspect="auto", cmap="Reds" if are_rates else "RdBu", vmin=0 if are_rates else -1, vmax=1)
    common, short = _without_common_start(layers)
    _label(axes, short, [f"{a} – {b}" for a, b in pairs])
    if len(layers) * len(pairs) <= 120:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                text = f"{value:.0%}" if are_rates else f"{value:+.2f}"
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    what = "how often a pair conflicts in each layer" if are_rates else "cosine of each pair in each layer"
    ends = "white: never   dark red: at every look" if are_rates else "red: against each other   blue: together"
    axes.set_title(f"{what}\n{ends}", fontsize=10)
    of = f" of {common}" if common else ""
    axes.set_xlabel(f"layer{of}" + (", from the input on" if len(layers) > 1 else ""))
    _bar(axes, image, "share of looks" if are_rates else "cosine")


def _history(axes: Axes, pairs: Sequence[tuple[str, str]], history: Mapping[int, Tensor]) -> None:
    """The pairs with the lowest mean, where there are too many for a legend."""
    rows = {step: found.tolist() for step, found in history.items()}
    seen = [[row[p] for row in rows.values() if row[p] == row[p]] for p in range(len(pairs))]  # not NaN: absent tasks
    means = [sum(own) / len(own) if own else 1.0 for own in seen]
    chosen = sorted(sorted(range(len(pairs)), key=means.__getitem__)[:_HISTORY_PAIRS])
    for p in chosen:
        axes.plot(list(rows), [row[p] for row in rows.values()], ".-", lw=1, markersize=3, label=" – ".join(pairs[p]))
    axes.axhline(0, color="black", lw=0.8)
    low, high = axes.get_ylim()
    axes.axhspan(min(low, -0.02), 0, color="tab:red", alpha=0.07, lw=0)
    axes.set_ylim(min(low, -0.02), max(high, 0.02))
    fewer = "" if len(chosen) == len(pairs) else f", the {len(chosen)} lowest pairs"
    axes.set_title(f"cosine over time, all layers{fewer}\nbelow 0: conflict", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("cosine")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    for axis, labels in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = -(-len(labels) // _MOST_LABELS)
        axis.set_ticks(range(0, len(labels), every), labels[::every], fontsize=9 if len(labels) <= 12 else 7)
    if max(map(len, columns), default=0) > 4:
        axes.tick_params(axis="x", rotation=60 if len(columns) > 3 else 20)


def _without_common_start(layers: Iterable[str]) -> tuple[str, list[str]]:
    """The parts that all names of modules begin with, and the names without them."""
    parts = [layer.split(".") for layer in layers]
    common = 0
    while len(parts) > 1 and all(len(own) > common + 1 and own[common] == parts[0][common] for own in parts):
        common += 1
    start = ".".join(parts[0][:common]) if parts else ""
    return start, [".".join(own[common:]) for own in parts]


def _bar(axes: Axes, image: Any, label: str) -> None:
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label=label)
