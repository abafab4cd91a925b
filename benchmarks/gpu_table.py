"""``python -m benchmarks.gpu_table [--check]``: the measured part of docs/kernels.md and the roofline plot.

From the rows of the latest run in benchmarks/results/gpu.jsonl alone. ``--check`` writes nothing and fails if the page
is not what the rows give. Without rows the page says that nothing was measured, and there is no plot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Row

PAGE = rows.ROOT / "docs" / "kernels.md"
PLOT = rows.ROOT / "benchmarks" / "results" / "gpu.png"
RESULTS = rows.ROOT / "benchmarks" / "results" / "gpu.jsonl"
START, END = "<!-- gpu-table:start -->", "<!-- gpu-table:end -->"
OPS = ("gram", "combine", "mix_", "pcgrad")


def table(latest: Sequence[Row]) -> str:
    """The share of the copy bandwidth at the largest J of each T, dtype and backend; then where it was measured."""
    if not latest:
        return "Not yet measured."
    ours = [r for r in latest if r.subject == "fastpcgrad" and r.ok]
    large = [r for r in ours if r.op in OPS and r.bandwidth_fraction is not None]
    shares: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in large:
        found = shares.setdefault((row.backend, row.dtype or "", row.T or 0), {})
        if row.op not in found or (row.N or 0) > (found[row.op].N or 0):
            found[row.op] = row
    lines = ["| backend, rows, T | " + " | ".join(f"`{op}`" for op in OPS) + " |", "|---|" + "---:|" * len(OPS)]
    for (backend, dtype, tasks), found in sorted(shares.items()):
        cells = [f"{found[op].bandwidth_fraction or 0:.0%}" if op in found else "" for op in OPS]
        lines.append(f"| {backend}, {dtype}, {tasks} | " + " | ".join(cells) + " |")
    times = {(r.op, r.T, r.N, r.dtype, r.backend): r.p50_ms for r in ours if r.op in OPS and r.p50_ms}
    both = {key[:-1] for key in times if (*key[:-1], "cuda") in times and (*key[:-1], "triton") in times}
    if both:
        faster = sorted(key for key in both if times[(*key, "triton")] < 0.97 * times[(*key, "cuda")])
        where = "; ".join(f"`{op}` T={tasks} N={width} {dtype}" for op, tasks, width, dtype in faster) or "none"
        lines += ["", f"The automatic choice is the compiled library. Triton was over 3 % faster at: {where}."]
    in_blocks = [r for r in ours if "packed" in r.ratios]
    if in_blocks:
        lines += ["", "Surgery on task gradients in blocks, one a parameter (packing: packed anew for each pass):", ""]
        lines += ["| blocks, backend, rows, T | ms | by packed rows |", "|---|---:|---:|"]
        for row in in_blocks:
            name = f"{row.note}, {row.backend}, {row.dtype}, {row.T}"
            lines.append(f"| {name} | {row.p50_ms or 0:.3f} | {row.ratios['packed']:.2f} |")
    speeds = {r.op: r.gbps for r in latest if r.kind == "bandwidth" and r.gbps}
    measured = ", ".join(f"{op} {gbps:.0f} GB/s" for op, gbps in speeds.items())
    last = latest[-1].environment
    return "\n".join(
        [
            "Bytes that an op has to move by its time, as a share of the copy bandwidth, at the largest J:",
            "",
            *lines,
            "",
            f"{last.device}; {measured}; torch {last.torch}; commit {last.commit}, {last.date}.",
        ]
    )


def plot(latest: Sequence[Row], path: Path = PLOT) -> None:
    """Bandwidth over the bytes of J for the ops on fp32 rows, T=8, with copy and read as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for backend, style in (("cuda", "-o"), ("triton", "--s")):
        for colour, op in enumerate(OPS):
            chosen = [r for r in latest if (r.op, r.backend, r.T, r.dtype) == (op, backend, 8, "float32") and r.gbps]
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
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page must hold {START} and {END}")
    return f"{before}{start}\n{table(latest)}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    latest, page = rows.latest(rows.read(RESULTS)), PAGE.read_text(encoding="utf-8")
    new = written(page, latest)
    if arguments.check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    if latest:
        plot(latest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
