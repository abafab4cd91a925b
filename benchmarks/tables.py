"""Tables from rows, in Markdown: of README.md and of docs/, and what a run shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks import samples, targets
from benchmarks.cases import DTYPES, OPS
from benchmarks.method_cases import FLOOR, PEER
from benchmarks.modes import DENSE_ROWS, FACTORED_ROWS
from benchmarks.rows import LIBRARY, MACHINE, Row
from benchmarks.steps import WHOLE

CPU_OPS = {"pcgrad": "`pcgrad(J)`", "gram": "`gram(J)`", "combine": "`combine(J, w)`", "mix_": "`mix_(J, C)`"}
"""In the order of docs/benchmarks.md."""
GPU_OPS = ("gram", "combine", "mix_", "pcgrad")
GPU_PEERS = {"torchjd": "TorchJD", "loop": "loop"}
SUMMARIZED = (LIBRARY, "torchjd", "loop", "pytorch_optimizer")
STREAMING = 256 << 20
"""Bytes of J from which on rows of a GPU are named by them, and not by N."""
_SHOWN = {"torch": "`torch.matmul`", "torchjd": "TorchJD", "loop": "the loop", "accumulate": "plain, summed"}
Lines = Sequence[Sequence[str]]


def markdown(header: Sequence[str], lines: Lines, gap: str = " ") -> str:
    """A table: the first column to the left, the others to the right. ``gap``: around the dashes under the header."""
    dashes = ["---", *["---:"] * (len(header) - 1)]
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (header, *lines))
    return "\n".join((first, "|" + "|".join(f"{gap}{d}{gap}" for d in dashes) + "|", *others))


def by_case(latest: Iterable[Row], kind: str, op: str) -> dict[str, dict[str, Row]]:
    """By case, then by subject."""
    found: dict[str, dict[str, Row]] = {}
    for row in latest:
        if (row.kind, row.op) == (kind, op):
            found.setdefault(row.case, {})[row.subject] = row
    return found


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def summary(latest: Sequence[Row]) -> str:
    """What whole steps and their peaks are by plain ones, of the library and of its peers."""
    if not latest:
        return "Not yet measured."
    tables = _step_table(latest, SUMMARIZED, only_whole=True), _peak_table(latest, SUMMARIZED)
    return "\n\n".join([*tables, origins(latest)])


def cpu(latest: Sequence[Row]) -> str:
    """The CPU's: targets, kernels, steps, peaks, and where they were measured."""
    if not latest:
        raise ValueError("there are no rows: run `python -m benchmarks.run --append` first")
    parts = [target_table(latest), _cpu_kernels(latest), _step_table(latest), _peak_table(latest), origins(latest)]
    return "\n\n".join(part for part in parts if part)


def target_table(latest: Sequence[Row], of: Sequence[targets.Target] = targets.CPU) -> str:
    lines = [(v.target.text, v.limit, v.value, v.word) for v in targets.verdicts(latest, of) if v.worst is not None]
    return markdown(("CPU target (the worst case counts)", "target", "measured", ""), lines) if lines else ""


def _cpu_kernels(latest: Sequence[Row]) -> str:
    kernels = [r for r in latest if r.kind == "kernel" and (r.dtype, r.layout) == ("float32", "contiguous")]
    if not kernels:
        return ""
    width, peers = max(r.N or 0 for r in kernels), ("torch", "torchjd", "loop", "pytorch_optimizer")
    lines = []
    for op, shown in CPU_OPS.items():
        for ours in kernels:
            if (ours.op, ours.N, ours.subject) != (op, width, LIBRARY) or not ours.ok:
                continue
            others = {r.subject: r for r in kernels if r.case == ours.case}
            time = f"{ours.p50_ms:.3g} ms" if ours.p50_ms is not None else ""
            rate = f"{ours.gbps:.3g} GB/s" if ours.gbps is not None else ""
            lines.append((f"{shown}, T={ours.T}", time, rate, *(_peer_takes(ours, others.get(p)) for p in peers)))
    header = (f"fp32, N=2^{width.bit_length() - 1}, J contiguous", LIBRARY, "moves")
    return markdown((*header, *(f"{_display(p)} takes" for p in peers)), lines)


def _peer_takes(ours: Row, peer: Row | None) -> str:
    """How many times as long as the library's the peer's time is."""
    if peer is None:
        return ""
    if not peer.ok:
        return peer.status.partition(" (")[0]
    return targets.shown(1 / ours.ratios[peer.subject], "times") if peer.subject in ours.ratios else ""


def _display(subject: str) -> str:
    base, bracket, rest = subject.partition("[")
    return _SHOWN.get(base, base) + (f", {rest.removesuffix(']')}" if bracket else "")


def _model(row: Row) -> str:
    """A case of the models with its size: ``mlp T=4, 13.6 M parameters``."""
    size = row.N or 0
    count = f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size}"
    return f"{row.case.removeprefix('memory ')}, {count} parameters"


def _subjects(cases: Mapping[str, Mapping[str, Row]], of: Sequence[str] | None) -> list[str]:
    """In the order of the rows; of some alone where they are given."""
    return [s for s in dict.fromkeys(s for found in cases.values() for s in found) if of is None or s in of]


def _step_table(latest: Sequence[Row], of: Sequence[str] | None = None, only_whole: bool = False) -> str:
    cases = by_case(latest, "step", "step")
    subjects = [s for s in _subjects(cases, of) if s != "plain"]
    shown = ((": whole step", True),) if only_whole else (("", False), (": whole step", True))
    lines = [
        (f"{_model(next(iter(found.values())))}{label}", *(_by_plain(found.get(s), whole) for s in subjects))
        for found in cases.values()
        for label, whole in shown
    ]
    header = ("T backwards and surgery / T plain backwards", *map(_display, subjects))
    return markdown(header, lines) if lines else ""


def _by_plain(row: Row | None, whole: bool) -> str:
    if row is None:
        return ""
    ratios = row.whole_ratios if whole else row.ratios
    return f"{ratios['plain']:.2f}×" if "plain" in ratios else row.status.partition(" (")[0]


def _peak_table(latest: Sequence[Row], of: Sequence[str] | None = None) -> str:
    cases = by_case(latest, "memory", "step")
    subjects = _subjects(cases, of)
    lines = []
    for found in cases.values():
        name = _model(max(found.values(), key=lambda row: row.N or 0))
        lines.append((name, *(_peak(found.get(s)) for s in subjects)))
    header = ("peak beyond model and activations / T·N·itemsize", *map(_display, subjects))
    return markdown(header, lines) if lines else ""


def _peak(row: Row | None) -> str:
    if row is None:
        return ""
    return row.status.partition(" (")[0] if row.peak_ratio is None else f"{row.peak_ratio:.2f}"


def origin(latest: Sequence[Row]) -> str:
    e = latest[-1].environment
    bandwidth = [f"{r.op} {r.gbps:.1f} GB/s" for r in latest if r.kind == "bandwidth" and r.gbps is not None]
    machine = f"{e.device}, {e.threads} threads" + (f", {', '.join(bandwidth)}" if bandwidth else "")
    versions = f"fastpcgrad {e.fastpcgrad}, torch {e.torch}, numpy {e.numpy}"
    return f"Measured on {machine}; {versions}; commit {e.commit}; {e.date}."


_PARTS = {"bandwidth": "Ops", "kernel": "Ops", "step": "Steps", "memory": "Peaks"}


def origins(latest: Sequence[Row]) -> str:
    """Of ops, steps and peaks, which may be of several runs."""
    runs: dict[str, list[Row]] = {}
    for row in latest:
        runs.setdefault(row.environment.run, []).append(row)
    if len(runs) == 1:
        return origin(latest)
    said = [(" and ".join(dict.fromkeys(_PARTS[row.kind] for row in of)), origin(of)) for of in runs.values()]
    return "\n\n".join(f"{parts}: {where[0].lower()}{where[1:]}" for parts, where in said)


def gpu(latest: Sequence[Row]) -> str:
    """All that one run on a GPU has to say, part by part; a part of which nothing was measured is left out."""
    if not latest:
        return "Not yet measured."
    ours = [row for row in latest if row.kind == "kernel" and row.subject == LIBRARY and row.ok]
    parts = [
        _shares(ours),
        _small(ours),
        _gpu_peers(latest),
        _in_blocks(ours),
        large_steps(latest),
        _gpu_origin(latest),
    ]
    return "\n\n".join(part for part in parts if part)


def _grid(caption: str, corner: str, cells: Mapping[tuple[str, int], str]) -> str:
    """A line for each label, in their order, and a column for each T; nothing without cells."""
    if not cells:
        return ""
    tasks = sorted({count for _, count in cells})
    lines = [
        (label, *(cells.get((label, count), "") for count in tasks))
        for label in dict.fromkeys(label for label, _ in cells)
    ]
    return f"{caption}\n\n" + markdown((corner, *(f"T={count}" for count in tasks)), lines, gap="")


def _shares(ours: Sequence[Row]) -> str:
    large = [row for row in ours if row.op in OPS and row.bandwidth_fraction is not None and "packed" not in row.note]
    large.sort(key=lambda row: (GPU_OPS.index(row.op), row.backend, row.dtype or "", row.N or 0))
    cells = {(f"`{r.op}`, {r.backend}, {r.dtype}", r.T or 0): f"{r.bandwidth_fraction:.0%}" for r in large}
    caption = "Bytes that an op has to move by its time, as a share of the copy bandwidth, at the largest J:"
    return _grid(caption, "op, backend, rows", cells) + _where_triton_was_faster(large)


def _where_triton_was_faster(large: Sequence[Row]) -> str:
    times = {(r.op, r.T, r.dtype, r.N, r.backend): r.p50_ms for r in large if r.p50_ms}
    both = {key[:-1] for key in times if (*key[:-1], "cuda") in times and (*key[:-1], "triton") in times}
    if not both:
        return ""
    faster = sorted(key for key in both if times[(*key, "triton")] < 0.97 * times[(*key, "cuda")])
    where = "; ".join(dict.fromkeys(f"`{op}` T={tasks} {dtype}" for op, tasks, dtype, _ in faster)) or "none"
    return (
        f"\n\nTriton was over 3 % faster at: {where}. On packed rows the automatic choice goes by such figures "
        "(`fastpcgrad/backends/crossovers.py`); elsewhere it is the compiled library."
    )


def _small(ours: Sequence[Row]) -> str:
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


def _gpu_peers(latest: Sequence[Row]) -> str:
    found = [r for r in latest if r.kind == "kernel" and r.subject in GPU_PEERS and r.dtype and LIBRARY in r.ratios]
    found.sort(key=lambda row: (row.subject != "torchjd", row.dtype, max(_bytes(row), STREAMING), row.N))
    cells = {}
    for row in found:
        name = GPU_PEERS[row.subject] + ("'s algorithm" if row.note else "")
        size = f"J of {_bytes(row) >> 20} MiB" if _bytes(row) >= STREAMING else f"N={row.N}"
        ratios = [row.ratios[key] for key in (LIBRARY, f"{LIBRARY}[graph]") if key in row.ratios]
        cells[f"{name}, {row.dtype}, {size}", row.T or 0] = " / ".join(map(_times, ratios))
    caption = (
        "Time of a peer's surgery by that of the library's faster backend: by its call, and by the replay of its graph:"
    )
    return _grid(caption, "peer, rows", cells)


def _bytes(row: Row) -> int:
    """Of J."""
    return (row.T or 0) * (row.N or 0) * (DTYPES[row.dtype].itemsize if row.dtype else 0)


def _in_blocks(ours: Sequence[Row]) -> str:
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


def large_steps(latest: Sequence[Row]) -> str:
    """The modes' times and peaks, of each case that has both."""
    timed, peaks = (by_case(latest, kind, "large") for kind in ("step", "memory"))
    return "\n\n".join(_modes(timed[case], peaks[case]) for case in timed if case in peaks)


def _modes(timed: Mapping[str, Row], peaks: Mapping[str, Row]) -> str:
    time, peak = next(iter(timed.values())), next(iter(peaks.values()))
    caption = (
        f"A transformer of {(time.N or 0) / 1e6:.0f} M parameters, T={time.T}: {time.note}; peaks beyond model and "
        f"activations, {peak.note}:"
    )
    header = ("mode", "ms", "by T plain passes", "`merge()` of the step", "peak / T·N·itemsize", "peak / N·itemsize")
    lines = [(m, *_time_cells(timed[m]), *_peak_cells(peaks[m])) for m in timed if m in peaks]
    return f"{caption}\n\n" + markdown(header, lines, gap="")


def _time_cells(row: Row) -> list[str]:
    if not row.ok or row.whole_p50_ms is None:
        return [row.status, "", ""]
    ratio, share = row.whole_ratios.get("plain"), row.ratios.get(WHOLE)
    ratio_cell, share_cell = "" if ratio is None else f"{ratio:.3f}", "" if share is None else f"{share:.1%}"
    return [f"{row.whole_p50_ms:.1f}", ratio_cell, share_cell]


def _peak_cells(row: Row) -> list[str]:
    if not row.ok or row.peak_ratio is None:
        return [row.status, ""]
    return [f"{row.peak_ratio:.3f}", f"{row.peak_ratio * (row.T or 1):.2f}"]


def _gpu_origin(latest: Sequence[Row]) -> str:
    speeds = {row.op: row.gbps for row in latest if row.kind == "bandwidth" and row.gbps}
    measured = "".join(f" {op} {gbps:.0f} GB/s;" for op, gbps in speeds.items())
    last = latest[-1].environment
    return f"{last.device};{measured} torch {last.torch}; commit {last.commit}, {last.date}."


def methods(latest: Sequence[Row]) -> str:
    """Each method's weights and aggregation against TorchJD's; nothing where there are no rows."""
    if not latest:
        return "Not yet measured."
    tasks = sorted({row.T for row in latest if row.T})
    columns = [(op, count) for op in ("weights", "aggregation") for count in tasks]
    units = {"weights": "µs", "aggregation": "ms"}
    header = ["method", *(f"{op}, {units[op]}, T={count}" for op, count in columns)]
    found = {(row.op, row.T, row.subject): row for row in latest}
    names = dict.fromkeys(row.op.partition(".")[0] for row in latest if row.subject == LIBRARY)
    lines = [[f"`{name}`", *(_method_cell(found, f"{name}.{op}", t) for op, t in columns)] for name in sorted(names)]
    floor = [_floor(found, count) if op == "aggregation" else "" for op, count in columns]
    if any(floor):
        lines.append(["*J read twice*", *floor])
    return f"{markdown(header, lines)}\n\n{_methods_summary(latest)}\n\n{_methods_origin(latest)}"


Found = Mapping[tuple[str, int | None, str], Row]


def _method_cell(found: Found, op: str, tasks: int) -> str:
    own, their = (found.get((op, tasks, subject)) for subject in (LIBRARY, PEER))
    if own is None or own.p50_ms is None:
        return ""
    value = f"{own.p50_ms * 1e3:.3g}" if op.endswith(".weights") else f"{own.p50_ms:.3g}"
    return f"{value} ({1 / own.ratios[PEER]:.3g}×)" if their is not None and their.p50_ms else value


def _floor(found: Found, tasks: int) -> str:
    row = found.get((FLOOR, tasks, MACHINE))
    return f"{row.p50_ms:.3g}" if row is not None and row.p50_ms else ""


def _methods_summary(latest: Sequence[Row]) -> str:
    parts = []
    for op in ("weights", "aggregation"):
        factors = [1 / row.ratios[PEER] for row in latest if row.op.endswith(f".{op}") and PEER in row.ratios]
        if factors:
            five, slower = sum(factor >= 5 for factor in factors), sum(factor < 1 for factor in factors)
            parts.append(f"{op}: {five} of {len(factors)} at least 5 times as fast as TorchJD, {slower} slower")
    return "; ".join(parts) + "." if parts else "Nothing to compare with."


def _methods_origin(latest: Sequence[Row]) -> str:
    e, widths = latest[-1].environment, sorted({row.N for row in latest if row.N})
    version = next((row.subject_version for row in latest if row.subject == PEER and row.subject_version), "none")
    return (
        f"N={', '.join(map(str, widths))}, fp32; {e.device}, {e.threads} threads; torch {e.torch}, TorchJD {version}; "
        f"commit {e.commit}, {e.date}."
    )


def gradnorm(latest: Sequence[Row]) -> str:
    """A step of every subject, and by those of the double backward and without any balancing."""
    floors = ("double backward", "equal weights")
    lines = []
    for row in latest:
        if (row.kind, row.op, row.ok) == ("step", "gradnorm", True):
            times = (f"{ms:.3f}" for ms in (row.p20_ms, row.p50_ms, row.p80_ms) if ms is not None)
            by = (f"{row.ratios[floor]:.2f}×" if floor in row.ratios else "" for floor in floors)
            lines.append((row.case, row.subject, *times, *by))
    header = ("case", "subject", "p20 ms", "p50 ms", "p80 ms", *(f"by {floor}" for floor in floors))
    return markdown(header, lines) if lines else ""


def floor(latest: Sequence[Row]) -> str:
    """One loss a sample against TorchJD's Engine, and tables that are looked up. Nothing where there are no rows."""
    lines = []
    for case, found in by_case(latest, "step", "samples").items():
        shown = [
            found[samples.ENGINE].ratios.get(samples.GRAM) if samples.ENGINE in found else None,
            *(found[name].whole_ratios.get(samples.PLAIN) for name in (samples.GRAM, samples.WHOLE)),
        ]
        lines.append((case.removeprefix("per sample "), *("" if ratio is None else f"{ratio:.3g}×" for ratio in shown)))
    header = ("one loss a sample", "Engine / `gramian`", "`gramian` / plain step", "step with PCGrad / plain step")
    peaks = by_case(latest, "memory", "floor")
    looked_up = []
    for case, found in by_case(latest, "step", "floor").items():
        if case.startswith("recommender"):
            peak = peaks.get(f"memory {case}", {}).get(LIBRARY)
            shown_peak = "" if peak is None or peak.peak_bytes is None else f"{peak.peak_bytes / 2**20:.0f} MiB"
            dense = _by_plain(found.get(DENSE_ROWS), False)
            name = case.removeprefix("recommender ")
            kind = "dense" if name.startswith("dense") else "sparse"
            name = name.removeprefix("dense ")
            looked_up.append((kind, name, _by_plain(found.get(LIBRARY), False), dense, shown_peak))
    if not lines and not looked_up:
        return ""
    by = "/ T plain backward passes"
    of_tables = ("gradients", "table", f"`pc_backward` {by}", f'`rows="dense"` {by}', "peak of two steps")
    how = " CPU time, on a machine that others use." if any("CPU time" in row.note for row in latest) else ""
    return "\n\n".join([markdown(header, lines), markdown(of_tables, looked_up), origin(latest) + how])


def factored(latest: Sequence[Row]) -> str:
    """Ways to keep rows, by plain backward passes; and peaks. Nothing where there are no rows."""
    subjects = {LIBRARY: '`rows="auto"`', DENSE_ROWS: '`rows="dense"`', FACTORED_ROWS: '`rows="factored"`'}
    timed, peaks = (by_case(latest, kind, "factored") for kind in ("step", "memory"))
    lines = [
        (f"{_model(next(iter(found.values())))}: time", *(_by_plain(found.get(s), False) for s in subjects))
        for found in timed.values()
    ]
    for found in peaks.values():
        shown = (found[s].peak_ratio if s in found else None for s in subjects)
        tasks = next(iter(found.values())).T or 1
        cells = ("" if ratio is None else f"{ratio * tasks:.2f} N" for ratio in shown)
        lines.append(
            (f"{_model(max(found.values(), key=lambda row: row.N or 0))}: peak of the first two steps", *cells)
        )
    header = ("`pc_backward` by T plain backward passes", *subjects.values())
    how = "CPU time. " if any("CPU time" in row.note for row in latest) else ""
    return f"{markdown(header, lines)}\n\n{how}{origin(latest)}" if lines else ""
