"""``python -m benchmarks.plot [--check]``: tables and plots, from the rows alone.

Only rows of the latest run of each file count, but for trainings, whose cells may be of several. The tables stand in
README.md and docs/ (``benchmarks.tables``, ``benchmarks.quality_tables``); ``--check`` writes nothing and fails if one
of them is not what the rows give.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import quality_tables, rows, samples, targets
from benchmarks.cases import WIDTHS
from benchmarks.modes import DENSE_ROWS, FACTORED_ROWS, floor_of
from benchmarks.pages import PAGES
from benchmarks.quality_problems import PROBLEMS
from benchmarks.quality_rules import BALANCERS, METHODS, PLAIN
from benchmarks.quality_tables import Outcome
from benchmarks.rows import FIGURES, LIBRARY, Row
from benchmarks.tables import CPU_OPS, GPU_OPS, by_case, origin

# Okabe and Ito's colours, which the colour-blind tell apart too, and paler ones for what belongs to one of them.
RED, PALE_RED, PINK, SKY, BLUE = "#d55e00", "#f2b98f", "#cc79a7", "#56b4e9", "#0072b2"
GREEN, PALE_GREEN, GREY, PALE_GREY, BLACK, ORANGE = "#009e73", "#8fd3bf", "#7f7f7f", "#c7c7c7", "#000000", "#e69f00"
CYCLE = BLUE, ORANGE, GREEN, RED, PINK
COLOURS = {
    LIBRARY: RED,
    f"{LIBRARY}[eager]": PALE_RED,
    f"{LIBRARY}.GradientSurgery": PINK,
    f"{LIBRARY}.backward": SKY,
    f"{LIBRARY}[bf16 rows]": PALE_RED,
    "torch": BLUE,
    "plain": GREY,
    "accumulate": PALE_GREY,
    "torchjd": GREEN,
    "torchjd[one by one]": PALE_GREEN,
    "loop": BLACK,
    "pytorch_optimizer": ORANGE,
}
LARGE_COLOURS = {
    "plain": GREY,
    "plain[shared graph]": PALE_GREY,
    "streaming": RED,
    "streaming[bf16 rows]": PALE_RED,
    "pc_backward": PINK,
    "two_phase": SKY,
    "torchjd": GREEN,
    "loop": BLACK,
}


def draw(folder: Path) -> list[Path]:
    """All plots that the committed rows have data for, as PNG."""
    cpu, large, floor, gpu = map(rows.latest_of, ("cpu", "large", "floor", "gpu"))
    of_cpu = draw_cpu([*cpu, *rows.latest_of("steps", "memory")], folder)
    others = [*draw_large(large, folder), *draw_floor(floor, folder), *draw_gpu(gpu, folder)]
    return [*of_cpu, *others, *draw_quality(rows.every_of("quality"), folder)]


def _save(figure: Any, path: Path, dpi: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the writer's version in it, equal rows give equal files.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    return path


def draw_cpu(latest: Sequence[Row], folder: Path) -> list[Path]:
    from matplotlib import rc_context

    made = []
    steps, peaks = ([row for row in latest if row.kind == kind] for kind in ("step", "memory"))
    ops = [row for row in latest if row.kind in ("kernel", "bandwidth")]
    with rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        for name, figure, of in (
            ("kernels", _kernels(ops), ops),
            ("bandwidth", _bandwidth(ops), ops),
            ("steps", _bars(steps, "step"), steps),
            ("memory", _bars(peaks, "memory"), peaks),
        ):
            if figure is not None:
                where = textwrap.fill(origin(of), int(16 * figure.get_figwidth()))
                figure.suptitle(f"{figure.get_suptitle()}\n{where}", fontsize=8)
                made.append(_save(figure, folder / f"{name}.png", 90))
    return made


def _panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _legend(figure: Any, lines: Mapping[str, Any]) -> None:
    columns = max(1, int(figure.get_figwidth() // 1.7))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns)


def _ops(kernels: Sequence[Row]) -> list[str]:
    return [op for op in CPU_OPS if any(r.op == op for r in kernels)]


def _kernels(latest: Sequence[Row]) -> Any:
    """One panel for each op, at the largest N: for each T a bar for each competitor, by the library's time."""
    ours = [
        r for r in latest if r.kind == "kernel" and (r.subject, r.dtype, r.layout) == (LIBRARY, "float32", "contiguous")
    ]
    widest = max((r.N or 0 for r in ours), default=0)
    kernels = [r for r in ours if widest == r.N and r.ratios]
    if not kernels:
        return None
    ops, tasks = _ops(kernels), sorted({r.T or 0 for r in kernels})
    figure, axes = _panels(1, len(ops), 2.7 * len(ops), 5, sharey=True)
    lines = {}
    for axis, op in zip(axes.flat, ops, strict=True):
        subjects = list(dict.fromkeys(subject for r in kernels if r.op == op for subject in r.ratios))
        for n, subject in enumerate(subjects):
            values = {r.T or 0: 1 / r.ratios[subject] for r in kernels if r.op == op and subject in r.ratios}
            places = [tasks.index(count) + (n + 0.5) / len(subjects) * 0.8 - 0.4 for count in values]
            lines[subject] = _cut_bars(axis, places, list(values.values()), COLOURS[subject], 0.8 / len(subjects))
        axis.axvline(1, color=COLOURS[LIBRARY], lw=1.5)
        axis.set_title(op, fontsize=8)
        axis.set_xlim(0, 1.3 * LONGEST_BAR)
    axes[0][0].set_yticks(range(len(tasks)), [f"T={count}" for count in tasks])
    axes[0][0].invert_yaxis()
    _legend(figure, lines)
    figure.suptitle(f"time / fastpcgrad's (the line), fp32, N=2^{widest.bit_length() - 1}, contiguous rows")
    return figure


def _bandwidth(latest: Sequence[Row]) -> Any:
    """One panel for each op: share of the machine's bandwidth over T, by layout and by competitor."""
    kernels = [r for r in latest if r.kind == "kernel" and r.bandwidth_fraction is not None and r.dtype == "float32"]
    if not kernels:
        return None
    width, ops = max(r.N or 0 for r in kernels), _ops(kernels)
    figure, axes = _panels(1, len(ops), 2.6 * len(ops), 3, sharey=True)
    lines = {}
    for axis, op in zip(axes.flat, ops, strict=True):
        groups = dict.fromkeys((r.subject, r.layout) for r in kernels if r.op == op and width == r.N)
        for subject, layout in groups:
            points = sorted(
                (r.T or 0, r.bandwidth_fraction or 0.0)
                for r in kernels
                if (r.op, r.N, r.subject, r.layout) == (op, width, subject, layout)
            )
            style = "o-" if layout == "contiguous" else "s--"
            (line,) = axis.plot(*zip(*points, strict=True), style, ms=3, lw=1, color=COLOURS.get(subject))
            lines[f"{subject}, {layout}"] = line
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({r.T for r in kernels if r.T is not None}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{op}, of {'read' if op == 'gram' else 'copy'}", fontsize=8)
        axis.set_xlabel("T")
    axes[0][0].set_ylabel("share of the machine's bandwidth")
    _legend(figure, lines)
    figure.suptitle(
        f"fp32, N=2^{width.bit_length() - 1}: bytes that must move / time, by the bandwidth measured in turn"
    )
    return figure


LONGEST_BAR = 6.0
"""Longer ones end there, and their labels say how long they are: else the loop's leave nothing to see of the others."""


def _cut_bars(axis: Any, places: Sequence[Any], values: Sequence[float], colour: Any, height: float = 0.8) -> Any:
    """Bars with their values beside them, the longest cut."""
    drawn = axis.barh(places, [min(value, LONGEST_BAR) for value in values], height, color=colour)
    axis.bar_label(drawn, [f"{value:.2f}{' →' * (value > LONGEST_BAR)}" for value in values], padding=2, fontsize=7)
    return drawn


def _bars(latest: Sequence[Row], kind: str) -> Any:
    """One panel for each case: a bar for each competitor, from 0; the target as a line."""
    cases = by_case(latest, kind, "step")
    if not cases:
        return None
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = _panels(lines, columns, 8, 2.3 * lines + 0.6, sharey=True)
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    for axis, (case, found) in zip(axes.flat, cases.items(), strict=False):
        values = {
            s: row.peak_ratio if kind == "memory" else 1.0 if s == "plain" else row.ratios.get("plain")
            for s, row in found.items()
        }
        target = 1.05 if kind == "memory" else 1.3 if case.startswith("tutorial") else 1.25
        _one_case(axis, {s: value for s, value in values.items() if value is not None}, COLOURS, target)
        axis.set_title(case.removeprefix("memory "), fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        "peak memory beyond model and activations / T·N·itemsize (dotted: target)"
        if kind == "memory"
        else "T backwards and surgery / T plain backwards (dotted: target)"
    )
    return figure


def _one_case(axis: Any, values: Mapping[str, float], colours: Mapping[str, str], target: float) -> None:
    _cut_bars(axis, list(values), list(values.values()), [colours.get(subject) for subject in values])
    axis.axvline(target, color="grey", ls=":")
    axis.set_xlim(0, 1.25 * min(LONGEST_BAR, max(values.values(), default=1.0)))


def draw_large(latest: Sequence[Row], folder: Path) -> list[Path]:
    """Above the whole step against plain passes, below the peak, at the size that most modes have; a column a T."""
    measured = [row.N for row in latest if row.ok and row.N and row.kind == "memory"]
    if not measured:
        return []
    size = f"{max(set(measured), key=measured.count) / 1e6:.0f}"
    chosen = [row for row in latest if row.ok and f"{(row.N or 0) / 1e6:.0f}" == size]
    tasks = sorted({row.T for row in chosen if row.T is not None})
    figure, panels = _panels(2, len(tasks), 3.2 * len(tasks) + 0.6, 5.6, sharey=True)
    for axes, count in zip(panels.T, tasks, strict=True):
        at = [row for row in chosen if count == row.T]
        steps = {row.subject: row.whole_ratios.get(floor_of(row.subject), 1.0) for row in at if row.kind == "step"}
        peaks = {row.subject: row.peak_ratio for row in at if row.peak_ratio is not None}
        _one_case(axes[0], {s: steps[s] for s in LARGE_COLOURS if s in steps}, LARGE_COLOURS, targets.STREAMING_STEP)
        _one_case(axes[1], {s: peaks[s] for s in LARGE_COLOURS if s in peaks}, LARGE_COLOURS, targets.STREAMING_PEAK)
        axes[0].set_title(f"T={count}: whole step / plain passes", fontsize=8)
        axes[1].set_title(f"T={count}: peak / T·N·itemsize", fontsize=8)
    panels[0][0].invert_yaxis()
    where = f"GPT-style transformer of {size} M parameters (dotted: target for streaming). {origin(chosen)}"
    figure.suptitle(textwrap.fill(where, 120), fontsize=8)
    return [_save(figure, folder / "large.png", 100)]


def draw_floor(latest: Sequence[Row], folder: Path) -> list[Path]:
    """Steps against T backward passes over the batch, a line for each width; peaks over T; one loss a sample."""
    if not latest:
        return []
    figure, ((steps, peaks, samples_axis),) = _panels(1, 3, 11, 3.8)
    timed = [row for row in latest if (row.kind, row.op) == ("step", "floor") and row.case.startswith("mlp")]
    for colour, model in enumerate(WIDTHS):
        for subject, style in ((LIBRARY, "o-"), (DENSE_ROWS, "o:")):
            chosen = [row for row in timed if row.case.startswith(f"{model} ") and row.subject == subject]
            points = sorted((int(row.case.rpartition("B=")[2]), row.ratios["plain"]) for row in chosen if row.ratios)
            if points:
                label = f"{model}, auto" if subject == LIBRARY else None
                steps.plot(*zip(*points, strict=True), style, ms=3, lw=1, color=CYCLE[colour], label=label)
    for subject, style in ((LIBRARY, "o-"), (DENSE_ROWS, "s:"), (FACTORED_ROWS, "^--")):
        chosen = [row for row in latest if (row.kind, row.op, row.subject) == ("memory", "floor", subject)]
        mlps = [row for row in chosen if row.peak_ratio is not None and "mlp" in row.case]
        points = sorted((row.T or 0, (row.peak_ratio or 0.0) * (row.T or 0)) for row in mlps)
        if points:
            peaks.plot(*zip(*points, strict=True), style, ms=4, label=subject.removeprefix(LIBRARY) or "auto")
    for subject in (samples.PLAIN, samples.GRAM, samples.WHOLE, samples.ENGINE):
        for widths, style in ((samples.NARROW, "o-"), (samples.WIDE, "s--")):
            case = samples.Case(widths, 0).label.partition("B=")[0]
            chosen = [row for row in latest if row.subject == subject and row.case.startswith(case)]
            points = sorted((row.T or 0, row.whole_p50_ms) for row in chosen if row.whole_p50_ms is not None)
            if points:
                name = subject if widths == samples.NARROW else None
                own = COLOURS.get(subject, RED if subject == samples.GRAM else SKY)
                samples_axis.plot(*zip(*points, strict=True), style, ms=4, color=own, label=name)
    steps.axhline(1, color="grey", lw=0.8)
    peaks.axhline(1.5, color="grey", ls=":")
    steps.set(xscale="log", xlabel="batch", title="T=8: pc_backward / T plain backwards\n(dotted: dense rows)")
    peaks.set(xlabel="T", title="peak of two steps / N·itemsize")
    samples_axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms")
    samples_axis.set_title("one loss a sample, with the forward\n(dashed: the wide MLP)")
    for axis, batches in ((steps, (4, 16, 64, 256)), (peaks, ()), (samples_axis, (32, 64, 128, 256))):
        if batches:
            axis.set_xticks(batches, batches, minor=False)
            axis.tick_params(which="minor", labelbottom=False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(origin(latest), 130), fontsize=8)
    return [_save(figure, folder / "floor.png", 100)]


def draw_gpu(latest: Sequence[Row], folder: Path) -> list[Path]:
    """Bandwidth over the bytes of J (fp32, T=8) for the ops and for graph replays, with copy and read as lines."""
    if not latest:
        return []
    figure, ((axes,),) = _panels(1, 1, 7, 4)
    rows_of_eight = [r for r in latest if (r.T, r.dtype) == (8, "float32") and r.gbps and not r.note]
    for backend, style in (("cuda", "-o"), ("triton", "--s")):
        for colour, op in enumerate((*GPU_OPS, "pcgrad[graph]")):
            chosen = [r for r in rows_of_eight if (r.op, r.backend) == (op, backend)]
            points = sorted((8 * (r.N or 0) * 4, r.gbps or 0.0) for r in chosen)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=CYCLE[colour], label=f"{op} {backend}")
    for row in latest:
        if row.kind == "bandwidth" and row.gbps:
            axes.axhline(row.gbps, color="grey", linestyle=":" if row.op == "read" else "-", linewidth=1, label=row.op)
    axes.set(xscale="log", xlabel="bytes of J (T=8, fp32)", ylabel="10⁹ bytes/s")
    axes.legend(ncols=2, fontsize=7)
    last = latest[-1].environment
    where = f"{last.device}; torch {last.torch}; commit {last.commit}, {last.date}"
    figure.suptitle(f"Bytes that must move / time of a call\n{where}", fontsize=8)
    return [_save(figure, folder / "gpu.png", 120)]


KINDS = ("sum", GREY, "s"), ("balancer", ORANGE, "^"), ("method", BLUE, "o")


def draw_quality(of: Sequence[Row], folder: Path) -> list[Path]:
    """A panel for each problem, a line for each rule: Δm, and the standard error of its difference from the sum."""
    every = {name: found for name, found in quality_tables.all_outcomes(of).items() if found}
    if not every:
        return []
    order = quality_tables.in_order(every)
    figure, (panels,) = _panels(1, len(every), 3 * len(every) + 1.2, 0.24 * len(order) + 1.6, sharey=True)
    for axes, (name, found) in zip(panels, every.items(), strict=True):
        means = [outcome.mean for outcome in found.values() if math.isfinite(outcome.mean)]
        lowest = max(min(means), LOWEST_DELTA)
        edge = lowest - 0.12 * (max(means) - lowest)
        axes.axvline(found[PLAIN].mean, color=GREY, lw=1, ls=":")
        for place, rule in enumerate(order):
            if rule in found:
                _quality_point(axes, place, found[rule], found[PLAIN], edge)
        axes.axhline(len(quality_tables.BASELINES) - 0.5, color=PALE_GREY, lw=0.8)
        axes.set(title=PROBLEMS[name].title, xlabel="Δm, %")
        axes.set_xlim(left=edge - 0.03 * (max(means) - edge))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(order)), order)
    panels[0].invert_yaxis()
    handles = {kind: panels[0].plot([], [], marker, color=colour)[0] for kind, colour, marker in KINDS}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(KINDS))
    figure.suptitle(
        "To the right is better: Δm against networks that learned one task alone (Poisson, Burgers: against the plain "
        "sum).\nBars: standard error of the difference from the plain sum (dotted), seed by seed. ←: beyond the axis.",
        fontsize=9,
    )
    return [_save(figure, folder / "quality.png", 100)]


LOWEST_DELTA = -60.0
"""Points further left stand at the edge, as numbers: else the worst leave nothing to see of the others."""


def _quality_point(axes: Any, place: int, outcome: Outcome, plain: Outcome, edge: float) -> None:
    _, colour, marker = KINDS[2 if outcome.rule in METHODS else 1 if outcome.rule in BALANCERS else 0]
    _, error = quality_tables.beside(outcome, plain)
    if outcome.mean >= LOWEST_DELTA:
        axes.errorbar(outcome.mean, place, xerr=error, fmt=marker, color=colour, ms=4, lw=1)
    else:
        axes.text(edge, place, f"← {quality_tables.number(outcome.mean)}", color=colour, va="center", fontsize=7)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Tables and plots from the rows.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is stale")
    options = parser.parse_args(arguments)
    if options.check:
        stale = [page.path.name for page in PAGES if page.is_stale()]
        for name in stale:
            print(f"{name}'s table is not what the rows give: run `python -m benchmarks.plot`", file=sys.stderr)
        return int(bool(stale))
    for page in PAGES:
        page.path.write_text(page.written(), encoding="utf-8")
    for path in draw(FIGURES):
        print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
