"""``python -m benchmarks.plot [--check]``: plots and the README's table, from the rows alone.

Only rows of the latest run count. The table stands in README.md between ``<!-- benchmark-table:start -->``
and ``<!-- benchmark-table:end -->``; ``--check`` writes nothing and fails if it is not what the rows give.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows, targets
from benchmarks.pages import between
from benchmarks.rows import Row

README = rows.ROOT / "README.md"
IMAGES = rows.ROOT / "benchmarks" / "results"
START, END = "<!-- benchmark-table:start -->", "<!-- benchmark-table:end -->"

LIBRARY = "fastpcgrad"
COLOURS = {
    LIBRARY: "#d62728",
    "fastpcgrad[eager]": "#ff9896",
    "fastpcgrad.GradientSurgery": "#e377c2",
    "fastpcgrad.backward": "#9467bd",
    "fastpcgrad[bf16 rows]": "#ff9896",
    "torch": "#1f77b4",
    "plain": "#7f7f7f",
    "accumulate": "#c7c7c7",
    "torchjd": "#2ca02c",
    "torchjd[one by one]": "#98df8a",
    "loop": "#000000",
    "pytorch_optimizer": "#bcbd22",
}

# What the README shows of each op: the widest fp32 rows, at these numbers of tasks.
_README_OPS = (
    ("pcgrad", "`pcgrad(J)`"),
    ("gram", "`gram(J)`"),
    ("combine", "`combine(J, w)`"),
    ("mix_", "`mix_(J, C)`"),
)
_PEERS = ("torch", "torchjd", "loop", "pytorch_optimizer")


def table(latest: Sequence[Row]) -> str:
    """The README's measured part, in Markdown."""
    if not latest:
        raise ValueError("there are no rows: run `python -m benchmarks.run --append` first")
    parts = [
        _target_table(latest),
        _kernel_table(latest),
        _step_table(latest),
        _memory_table(latest),
        _origin(latest),
    ]
    return "\n\n".join(part for part in parts if part)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _target_table(latest: Sequence[Row]) -> str:
    lines = [(v.target.text, v.limit, v.value, v.word) for v in targets.verdicts(latest) if v.worst is not None]
    return _markdown(("CPU target (the worst case counts)", "target", "measured", ""), lines) if lines else ""


def _times(ours: Row, peer: Row | None) -> str:
    """How many times as long as the library's the peer's time is."""
    if peer is None:
        return ""
    if not peer.ok:
        return peer.status.partition(" (")[0]
    return targets.shown(1 / ours.ratios[peer.subject], "times") if peer.subject in ours.ratios else ""


def _kernel_table(latest: Sequence[Row]) -> str:
    kernels = [r for r in latest if r.kind == "kernel" and (r.dtype, r.layout) == ("float32", "contiguous")]
    if not kernels:
        return ""
    width = max(r.N or 0 for r in kernels)
    lines = []
    for op, shown in _README_OPS:
        for ours in kernels:
            if (ours.op, ours.N, ours.subject) != (op, width, LIBRARY) or not ours.ok:
                continue
            peers = {r.subject: r for r in kernels if r.case == ours.case}
            time = f"{ours.p50_ms:.3g} ms" if ours.p50_ms is not None else ""
            rate = f"{ours.gbps:.3g} GB/s" if ours.gbps is not None else ""
            lines.append((f"{shown}, T={ours.T}", time, rate, *(_times(ours, peers.get(p)) for p in _PEERS)))
    power = width.bit_length() - 1
    header = (f"fp32, N=2^{power}, J contiguous", LIBRARY, "moves", *(f"{_display(p)} takes" for p in _PEERS))
    return _markdown(header, lines)


def _display(subject: str) -> str:
    base, bracket, rest = subject.partition("[")
    names = {"torch": "`torch.matmul`", "torchjd": "TorchJD", "loop": "the loop", "accumulate": "plain, summed"}
    return names.get(base, base) + (f", {rest.removesuffix(']')}" if bracket else "")


def _model(row: Row) -> str:
    """A case of the models with its size: ``mlp T=4, 13.6 M parameters``."""
    size = row.N or 0
    count = f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size}"
    return f"{row.case.removeprefix('memory ')}, {count} parameters"


def _by_case(latest: Sequence[Row], kind: str, op: str) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in latest:
        if (row.kind, row.op) == (kind, op):
            cases.setdefault(row.case, {})[row.subject] = row
    return cases


def _step_table(latest: Sequence[Row]) -> str:
    cases = _by_case(latest, "step", "step")
    subjects = [s for s in dict.fromkeys(s for found in cases.values() for s in found) if s != "plain"]
    lines = [
        (f"{_model(next(iter(found.values())))}{label}", *(_ratio(found.get(s), "plain", whole) for s in subjects))
        for found in cases.values()
        for label, whole in (("", False), (": whole step", True))
    ]
    header = ("T backwards and surgery / T plain backwards", *map(_display, subjects))
    return _markdown(header, lines) if lines else ""


def _ratio(row: Row | None, to: str, whole: bool) -> str:
    if row is None:
        return ""
    ratios = row.whole_ratios if whole else row.ratios
    return f"{ratios[to]:.2f}×" if to in ratios else row.status.partition(" (")[0]


def _memory_table(latest: Sequence[Row]) -> str:
    cases = _by_case(latest, "memory", "step")
    subjects = list(dict.fromkeys(s for found in cases.values() for s in found))
    lines = []
    for found in cases.values():
        peaks = [found[s].peak_ratio if s in found else None for s in subjects]
        lines.append(
            (_model(max(found.values(), key=lambda row: row.N or 0)), *("" if p is None else f"{p:.2f}" for p in peaks))
        )
    header = ("peak beyond model and activations / T·N·itemsize", *map(_display, subjects))
    return _markdown(header, lines) if lines else ""


def _origin(latest: Sequence[Row]) -> str:
    e = latest[-1].environment
    bandwidth = [f"{r.op} {r.gbps:.1f} GB/s" for r in latest if r.kind == "bandwidth" and r.gbps is not None]
    machine = f"{e.device}, {e.threads} threads" + (f", {', '.join(bandwidth)}" if bandwidth else "")
    versions = f"fastpcgrad {e.fastpcgrad}, torch {e.torch}, numpy {e.numpy}"
    return f"Measured on {machine}; {versions}; commit {e.commit}; {e.date}."


def draw(latest: Sequence[Row], folder: Path) -> list[Path]:
    """All plots that the rows have data for, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 90})
    made = []
    for name, figure in (
        ("kernels", _draw_kernels(latest)),
        ("bandwidth", _draw_bandwidth(latest)),
        ("steps", _draw_bars(latest, "step")),
        ("memory", _draw_bars(latest, "memory")),
    ):
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        origin = textwrap.fill(_origin(latest), int(16 * figure.get_figwidth()))
        figure.suptitle(f"{figure.get_suptitle()}\n{origin}", fontsize=8)
        # Without the writer's version in it, equal rows give equal files.
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
        made.append(path)
    return made


def _legend(figure: Any, lines: Mapping[str, Any]) -> None:
    columns = max(1, int(figure.get_figwidth() // 1.7))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns)


def _draw_kernels(latest: Sequence[Row]) -> Any:
    """One panel for each op and T: time over N, every competitor a line."""
    import matplotlib.pyplot as plt

    kernels = [
        r for r in latest
        if r.kind == "kernel" and r.ok and (r.dtype, r.layout) == ("float32", "contiguous")
    ]  # fmt: skip
    ops = [op for op, _ in _README_OPS if any(r.op == op for r in kernels)]
    tasks = sorted({r.T for r in kernels if r.T is not None})
    if not kernels:
        return None
    figure, axes = plt.subplots(
        len(ops), len(tasks), figsize=(2.4 * len(tasks), 2.1 * len(ops) + 0.6), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    lines = {}
    for axis, (op, count) in zip(axes.flat, ((op, t) for op in ops for t in tasks), strict=True):
        for subject in dict.fromkeys(r.subject for r in kernels):
            points = [
                (r.N, r.p50_ms, r.p20_ms, r.p80_ms) for r in kernels if (r.op, r.T, r.subject) == (op, count, subject)
            ]
            if not points:
                continue
            n, p50, p20, p80 = zip(*sorted(points), strict=True)
            (lines[subject],) = axis.plot(n, p50, "o-", ms=3, lw=1, color=COLOURS.get(subject))
            axis.fill_between(n, p20, p80, color=COLOURS.get(subject), alpha=0.15, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{op}, T={count}", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms")
    for axis in axes[-1]:
        axis.set_xlabel("N")
    _legend(figure, lines)
    figure.suptitle("fp32, contiguous rows: median time of a call, band p20 to p80")
    return figure


def _draw_bandwidth(latest: Sequence[Row]) -> Any:
    """One panel for each op: share of the machine's bandwidth over T, by layout and by competitor."""
    import matplotlib.pyplot as plt

    kernels = [r for r in latest if r.kind == "kernel" and r.bandwidth_fraction is not None and r.dtype == "float32"]
    if not kernels:
        return None
    width = max(r.N or 0 for r in kernels)
    ops = [op for op, _ in _README_OPS if any(r.op == op for r in kernels)]
    figure, axes = plt.subplots(
        1, len(ops), figsize=(2.6 * len(ops), 3), sharey=True, squeeze=False, layout="constrained"
    )
    lines = {}
    for axis, op in zip(axes.flat, ops, strict=True):
        groups = dict.fromkeys((r.subject, r.layout) for r in kernels if r.op == op and width == r.N)
        for subject, layout in groups:
            points = sorted(
                (r.T or 0, r.bandwidth_fraction or 0.0) for r in kernels
                if (r.op, r.N, r.subject, r.layout) == (op, width, subject, layout)
            )  # fmt: skip
            style = "o-" if layout == "contiguous" else "s--"
            (line,) = axis.plot(*zip(*points, strict=True), style, ms=3, lw=1, color=COLOURS.get(subject))
            lines[f"{subject}, {layout}"] = line
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{op}, of {'read' if op == 'gram' else 'copy'}", fontsize=8)
        axis.set_xlabel("T")
    axes[0][0].set_ylabel("share of the machine's bandwidth")
    _legend(figure, lines)
    figure.suptitle(f"fp32, N=2^{width.bit_length() - 1}")
    return figure


def _draw_bars(latest: Sequence[Row], kind: str) -> Any:
    """One panel for each case: a bar for each competitor; the target as a line."""
    import matplotlib.pyplot as plt

    cases = _by_case(latest, kind, "step")
    if not cases:
        return None
    figure, axes = plt.subplots(
        1, len(cases), figsize=(3.0 * len(cases), 2.8), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (case, found) in zip(axes.flat, cases.items(), strict=True):
        values = {
            s: row.peak_ratio if kind == "memory" else 1.0 if s == "plain" else row.ratios.get("plain")
            for s, row in found.items()
        }
        bars = {s: value for s, value in values.items() if value is not None}
        drawn = axis.barh(list(bars), list(bars.values()), color=[COLOURS.get(s) for s in bars])
        axis.bar_label(drawn, fmt="%.2f", padding=2)
        axis.axvline(1.05 if kind == "memory" else 1.3 if case.startswith("tutorial") else 1.25, color="grey", ls=":")
        highest = 2.5 * max(bars.values(), default=1.0)
        axis.set_xscale("log")
        axis.set_xlim(min(bars.values(), default=1.0) / 1.5, highest)
        axis.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if tick < highest])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_title(case, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        "peak memory beyond model and activations / T·N·itemsize (dotted: target)"
        if kind == "memory"
        else "T backwards and surgery / T plain backwards (dotted: target)"
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Plots and README table from rows.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README's table is stale")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)

    latest = rows.latest(rows.read(options.results))
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = between(before, START, END, table(latest))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        if before != after:
            print(
                "README.md's table is not what the rows give: run `python -m benchmarks.plot`",
                file=sys.stderr,
            )
        return int(before != after)
    options.readme.write_text(after, encoding="utf-8")
    for path in draw(latest, options.images):
        print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
