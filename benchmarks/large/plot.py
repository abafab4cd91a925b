"""``python -m benchmarks.large.plot``: step time and peak memory over model size, from the rows of the latest run."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.large import RESULTS
from benchmarks.large.modes import mode_named
from benchmarks.large.targets import TARGETS
from benchmarks.rows import Row

IMAGE = rows.ROOT / "benchmarks" / "results" / "large.png"
COLOURS = {
    "plain": "#7f7f7f",
    "plain[shared graph]": "#c7c7c7",
    "streaming": "#d62728",
    "streaming[bf16 rows]": "#ff9896",
    "pc_backward": "#e377c2",
    "two_phase": "#9467bd",
    "torchjd": "#2ca02c",
    "loop": "#000000",
}
STEP_LIMIT, MEMORY_LIMIT = TARGETS[0].limit, TARGETS[2].limit


def draw(latest: Sequence[Row], path: Path = IMAGE) -> None:
    """Above the whole step against plain passes, below the peak; a column for each T, every mode a line."""
    from matplotlib.figure import Figure

    tasks = sorted({row.T for row in latest if row.T is not None})
    figure = Figure(figsize=(3.2 * len(tasks) + 0.6, 5.6), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False, sharex=True, sharey="row")
    lines: dict[str, Any] = {}
    for axes, count in zip(panels.T, tasks, strict=True):
        at = [row for row in latest if count == row.T and row.ok and row.N]
        for subject in COLOURS:
            for axis, points in zip(axes, (_step_points(at, subject), _memory_points(at, subject)), strict=True):
                if points:
                    (lines[subject],) = axis.plot(*zip(*points, strict=True), "o-", ms=4, color=COLOURS[subject])
        axes[0].set_title(f"T={count}")
        axes[1].set_xlabel("N, parameters")
        for axis, limit in zip(axes, (STEP_LIMIT, MEMORY_LIMIT), strict=True):
            axis.axhline(limit, color="grey", ls=":")
            axis.set(xscale="log", yscale="log")
            axis.set_yticks((0.1, 0.2, 0.5, 1, 2, 5, 10))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    panels[0][0].set_ylabel("whole step / plain passes")
    panels[1][0].set_ylabel("peak / T·N·itemsize")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    last = latest[-1].environment
    origin = f"{last.device}, {last.threads} threads; torch {last.torch}; commit {last.commit}, {last.date}"
    figure.suptitle(textwrap.fill(f"GPT-style transformer (dotted: target for streaming). {origin}", 90), fontsize=9)
    # Without the writer's version in it, equal rows give equal files.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _step_points(at: Sequence[Row], subject: str) -> list[tuple[int, float]]:
    """Each mode against the plain passes over graphs of the same kind."""
    floor = mode_named(subject).floor
    chosen = [row for row in at if row.kind == "step" and row.subject == subject != floor]
    return sorted((row.N or 0, row.whole_ratios[floor]) for row in chosen if floor in row.whole_ratios)


def _memory_points(at: Sequence[Row], subject: str) -> list[tuple[int, float]]:
    chosen = [row for row in at if row.kind == "memory" and row.subject == subject]
    return sorted((row.N or 0, row.peak_ratio) for row in chosen if row.peak_ratio is not None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--image", type=Path, default=IMAGE)
    options = parser.parse_args()
    latest = rows.latest(rows.read(options.results))
    if not latest:
        parser.error(f"no rows in {options.results}: run `python -m benchmarks.large --append` first")
    draw(latest, options.image)
    print(f"{options.image} ({options.image.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
