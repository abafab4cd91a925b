"""``python -m benchmarks.gpu_table [--check]``: the measured part of docs/kernels.md and the roofline plot.

From the rows of the latest run in benchmarks/results/gpu.jsonl alone. ``--check`` writes nothing and fails if the page
is not what the rows give. Without rows the page says that nothing was measured, and there is no plot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.large.modes import WHOLE
from benchmarks.pages import between, rewrite
from benchmarks.rows import Row

PAGE = rows.ROOT / "docs" / "kernels.md"
PLOT = rows.ROOT / "benchmarks" / "results" / "gpu.png"
RESULTS = rows.ROOT / "benchmarks" / "results" / "gpu.jsonl"
START, END = "<!-- gpu-table:start -->", "<!-- gpu-table:end -->"
OPS = ("gram", "combine", "mix_", "pcgrad")
PEERS = {"torchjd": "TorchJD", "loop": "loop"}
ITEMSIZE = {"float32": 4, "bfloat16": 2}
STREAMING = 256 << 20
"""Bytes of J from which on rows are named by them, and not by N."""


def table(latest: Sequence[Row]) -> str:
    """All that one run has to say, part by part; a part of which nothing was measured is left out."""
    if not latest:
        return "Not yet measured."
    ours = [row for row in latest if row.kind == "kernel" and row.subject == "fastpcgrad" and row.ok]
    parts = [_shares(ours), _small(ours), _peers(latest), _in_blocks(ours), _steps(latest), [_where(latest)]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _grid(caption: str, corner: str, cells: Mapping[tuple[str, int], str]) -> list[str]:
    """A line for each label, in their order, and a column for each T; nothing without cells."""
    if not cells:
        return []
    tasks = sorted({count for _, count in cells})
    lines = [caption, "", f"| {corner} | " + " | ".join(f"T={count}" for count in tasks) + " |"]
    lines.append("|---|" + "---:|" * len(tasks))
    for label in dict.fromkeys(label for label, _ in cells):
        lines.append(f"| {label} | " + " | ".join(cells.get((label, count), "") for count in tasks) + " |")
    return lines


def _shares(ours: Sequence[Row]) -> list[str]:
    large = [row for row in ours if row.op in OPS and row.bandwidth_fraction is not None and "packed" not in row.note]
    large.sort(key=lambda row: (OPS.index(row.op), row.backend, row.dtype or "", row.N or 0))
    cells = {(f"`{r.op}`, {r.backend}, {r.dtype}", r.T or 0): f"{r.bandwidth_fraction:.0%}" for r in large}
    caption = "Bytes that an op has to move by its time, as a share of the copy bandwidth, at the largest J:"
    return [*_grid(caption, "op, backend, rows", cells), *_where_triton_was_faster(large)]


def _where_triton_was_faster(large: Sequence[Row]) -> list[str]:
    times = {(r.op, r.T, r.dtype, r.N, r.backend): r.p50_ms for r in large if r.p50_ms}
    both = {key[:-1] for key in times if (*key[:-1], "cuda") in times and (*key[:-1], "triton") in times}
    if not both:
        return []
    faster = sorted(key for key in both if times[(*key, "triton")] < 0.97 * times[(*key, "cuda")])
    where = "; ".join(dict.fromkeys(f"`{op}` T={tasks} {dtype}" for op, tasks, dtype, _ in faster)) or "none"
    return [
        "",
        f"Triton was over 3 % faster at: {where}. On packed rows the automatic choice goes by such figures "
        "(`fastpcgrad/backends/crossovers.py`); elsewhere it is the compiled library.",
    ]


def _small(ours: Sequence[Row]) -> list[str]:
    by_op: dict[str, dict[tuple[str, str, int, int], float]] = {"pcgrad": {}, "pcgrad[graph]": {}}
    for row in ours:
        if row.op in by_op and row.p50_ms and not row.note:
            by_op[row.op][row.backend, row.dtype or "", row.N or 0, row.T or 0] = 1e3 * row.p50_ms
    calls, replays = by_op.values()
    cells = {
        (f"{backend}, {dtype}, N={width}", tasks): f"{calls[key]:.1f} / {replays[key]:.1f}"
        for key in sorted(calls.keys() & replays.keys())
        for backend, dtype, width, tasks in [key]
    }
    return _grid("Small J: µs of a surgery by itself, and as a replay of a CUDA graph:", "backend, rows", cells)


def _peers(latest: Sequence[Row]) -> list[str]:
    found = [r for r in latest if r.subject in PEERS and r.dtype and r.N and r.T and "fastpcgrad" in r.ratios]
    found.sort(key=lambda row: (row.subject != "torchjd", row.dtype, max(_bytes(row), STREAMING), row.N))
    cells = {}
    for row in found:
        name = PEERS[row.subject] + ("'s algorithm" if row.note else "")
        size = f"J of {_bytes(row) >> 20} MiB" if _bytes(row) >= STREAMING else f"N={row.N}"
        ratios = [row.ratios[key] for key in ("fastpcgrad", "fastpcgrad[graph]") if key in row.ratios]
        cells[f"{name}, {row.dtype}, {size}", row.T or 0] = " / ".join(map(_times, ratios))
    caption = (
        "Time of a peer's surgery by that of the library's faster backend: by its call, and by the replay of its graph:"
    )
    return _grid(caption, "peer, rows", cells)


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _bytes(row: Row) -> int:
    """Of J."""
    return (row.T or 0) * (row.N or 0) * ITEMSIZE.get(row.dtype or "", 0)


def _in_blocks(ours: Sequence[Row]) -> list[str]:
    cells = {
        (f"{row.note}, {row.backend}, {row.dtype}", row.T or 0): f"{row.p50_ms:.3f}, {row.ratios['packed']:.2f}"
        for row in ours
        if "packed" in row.ratios
    }
    caption = (
        "Surgery on task gradients in blocks, one a parameter (packing: packed anew for each pass): "
        "ms, and by the time for packed rows:"
    )
    return _grid(caption, "blocks, backend, rows", dict(sorted(cells.items())))


def _steps(latest: Sequence[Row]) -> list[str]:
    timed, peaks = (
        {row.subject: row for row in latest if (row.kind, row.op) == (kind, "large")} for kind in ("step", "memory")
    )
    if not timed or not peaks:
        return []
    time, peak = next(iter(timed.values())), next(iter(peaks.values()))
    lines = [
        f"A transformer of {(time.N or 0) / 1e6:.0f} M parameters, T={time.T}: {time.note}; peaks beyond model and "
        f"activations, {peak.note}:",
        "",
        "| mode | ms | by T plain passes | `merge()` of the step | peak / T·N·itemsize | peak / N·itemsize |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for mode in filter(peaks.__contains__, timed):
        lines.append(f"| {mode} | " + " | ".join((*_time_cells(timed[mode]), *_peak_cells(peaks[mode]))) + " |")
    return lines


def _time_cells(row: Row) -> list[str]:
    if not row.ok or row.whole_p50_ms is None:
        return [row.status, "", ""]
    ratio, share = row.whole_ratios.get("plain"), row.ratios.get(WHOLE)
    return [
        f"{row.whole_p50_ms:.1f}",
        "" if ratio is None else f"{ratio:.3f}",
        "" if share is None else f"{share:.1%}",
    ]


def _peak_cells(row: Row) -> list[str]:
    if not row.ok or row.peak_ratio is None:
        return [row.status, ""]
    return [f"{row.peak_ratio:.3f}", f"{row.peak_ratio * (row.T or 1):.2f}"]


def _where(latest: Sequence[Row]) -> str:
    speeds = {row.op: row.gbps for row in latest if row.kind == "bandwidth" and row.gbps}
    measured = "".join(f" {op} {gbps:.0f} GB/s;" for op, gbps in speeds.items())
    last = latest[-1].environment
    return f"{last.device};{measured} torch {last.torch}; commit {last.commit}, {last.date}."


def plot(latest: Sequence[Row], path: Path = PLOT) -> None:
    """Bandwidth over the bytes of J (fp32, T=8) for the ops and for graph replays, with copy and read as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows_of_eight = [r for r in latest if (r.T, r.dtype) == (8, "float32") and r.gbps and not r.note]
    for backend, style in (("cuda", "-o"), ("triton", "--s")):
        for colour, op in enumerate((*OPS, "pcgrad[graph]")):
            chosen = [r for r in rows_of_eight if (r.op, r.backend) == (op, backend)]
            points = sorted((8 * (r.N or 0) * 4, r.gbps or 0.0) for r in chosen)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=f"{op} {backend}")
    for row in latest:
        if row.kind == "bandwidth" and row.gbps:
            axes.axhline(row.gbps, color="grey", linestyle=":" if row.op == "read" else "-", linewidth=1, label=row.op)
    axes.set(xscale="log", xlabel="bytes of J (T=8, fp32)", ylabel="10⁹ bytes/s")
    axes.legend(ncols=2, fontsize=7)
    figure.savefig(path, dpi=120)


def written(page: str, latest: Sequence[Row]) -> str:
    """The page with its measured part replaced."""
    return between(page, START, END, table(latest))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    latest = rows.latest(rows.read(RESULTS))
    if latest and not arguments.check:
        plot(latest)
    return rewrite(PAGE, written(PAGE.read_text(encoding="utf-8"), latest), arguments.check)


if __name__ == "__main__":
    sys.exit(main())
