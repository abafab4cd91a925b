"""``python -m benchmarks.methods_table [--check]``: the measured part of docs/methods.md.

From the rows of the latest run in benchmarks/results/methods.jsonl alone. ``--check`` writes nothing and fails if the
page is not what the rows give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import rows
from benchmarks.method_cases import FLOOR, PEER
from benchmarks.pages import between, rewrite
from benchmarks.rows import Row
from benchmarks.subjects import LIBRARY

PAGE = rows.ROOT / "docs" / "methods.md"
RESULTS = rows.ROOT / "benchmarks" / "results" / "methods.jsonl"
START, END = "<!-- methods-table:start -->", "<!-- methods-table:end -->"


def table(latest: Sequence[Row]) -> str:
    """What one run has to say; nothing where there are no rows."""
    if not latest:
        return "Not yet measured."
    tasks = sorted({row.T for row in latest if row.T})
    columns = [(op, count) for op in ("weights", "aggregation") for count in tasks]
    units = {"weights": "µs", "aggregation": "ms"}
    header = ["method", *(f"{op}, {units[op]}, T={count}" for op, count in columns)]
    names = dict.fromkeys(row.op.partition(".")[0] for row in latest if row.subject == LIBRARY)
    lines = [header, ["---", *["---:"] * len(columns)]]
    lines += [[f"`{name}`", *(_cell(latest, f"{name}.{op}", count) for op, count in columns)] for name in sorted(names)]
    floor = [_floor(latest, count) if op == "aggregation" else "" for op, count in columns]
    if any(floor):
        lines.append(["*J read twice*", *floor])
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", _summary(latest), "", _where(latest)])


def _cell(latest: Sequence[Row], op: str, tasks: int) -> str:
    own, their = (_row(latest, op, tasks, subject) for subject in (LIBRARY, PEER))
    if own is None or own.p50_ms is None:
        return ""
    value = f"{own.p50_ms * 1e3:.3g}" if op.endswith(".weights") else f"{own.p50_ms:.3g}"
    return f"{value} ({_factor(own):.3g}×)" if their is not None and their.p50_ms else value


def _row(latest: Sequence[Row], op: str, tasks: int, subject: str) -> Row | None:
    return next((row for row in latest if (row.op, row.T, row.subject) == (op, tasks, subject)), None)


def _factor(own: Row) -> float:
    """TorchJD's time over the library's."""
    return 1 / own.ratios[PEER]


def _floor(latest: Sequence[Row], tasks: int) -> str:
    row = _row(latest, FLOOR, tasks, "machine")
    return f"{row.p50_ms:.3g}" if row is not None and row.p50_ms else ""


def _summary(latest: Sequence[Row]) -> str:
    parts = []
    for op in ("weights", "aggregation"):
        factors = [_factor(row) for row in latest if row.op.endswith(f".{op}") and PEER in row.ratios]
        if factors:
            five, slower = sum(factor >= 5 for factor in factors), sum(factor < 1 for factor in factors)
            parts.append(f"{op}: {five} of {len(factors)} at least 5 times as fast as TorchJD, {slower} slower")
    return "; ".join(parts) + "." if parts else "Nothing to compare with."


def _where(latest: Sequence[Row]) -> str:
    e, widths = latest[-1].environment, sorted({row.N for row in latest if row.N})
    version = next((row.subject_version for row in latest if row.subject == PEER and row.subject_version), "none")
    return (
        f"N={', '.join(map(str, widths))}, fp32; {e.device}, {e.threads} threads; torch {e.torch}, TorchJD {version}; "
        f"commit {e.commit}, {e.date}."
    )


def written(page: str, latest: Sequence[Row]) -> str:
    """The page with its measured part replaced."""
    return between(page, START, END, table(latest))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    new = written(PAGE.read_text(encoding="utf-8"), rows.latest(rows.read(RESULTS)))
    return rewrite(PAGE, new, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
