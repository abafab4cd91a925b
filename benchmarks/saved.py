"""What pytest-benchmark measured and saved as JSON, as rows.

Beside the plugin's own entries (``stats``, with all timings) each benchmark's ``extra_info`` holds what
``conftest.Timed`` knows of it; what has no numbers stands, with its status, in the report's ``unmeasured``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.rows import LIBRARY, MACHINE, Environment, Row
from benchmarks.timing import Samples, with_times

ROW, BYTES, RATIO, COLD, FASTEST = "row", "bytes", "library's time / this one's", "cold", "one of several ways"
"""Of ``extra_info``: the row's fields; bytes that a call moves; the ratio in turn; whether it is of the first call of
all; whether the fastest of its case alone counts."""
UNMEASURED = "unmeasured"
Entry = tuple[Row, Mapping[str, Any]]


def rows(report: Mapping[str, Any], environment: Environment) -> list[Row]:
    """The rows of a report. Shares of bandwidth are of the best that the machine showed in it."""
    entries = _fastest_of_ways([_entry(benchmark, environment) for benchmark in report["benchmarks"]])
    best: dict[str, float] = {}
    for row, _ in entries:
        if row.subject == MACHINE and row.gbps is not None:
            way = "read" if row.op in ("read", "gram") else "copy"
            best[way] = max(best.get(way, 0.0), row.gbps)
    found = []
    for row, info in entries:
        if row.kind == "bandwidth":
            found.append(dataclasses.replace(row, gbps=best[row.op]))
        elif row.kind != "kernel":
            found.append(_with_ratios(row, info, entries))
        elif row.subject != MACHINE:
            of = best.get("read" if row.op == "gram" else "copy")
            share = row.gbps / of if of and row.gbps else None
            found.append(dataclasses.replace(_with_ratios(row, info, entries), bandwidth_fraction=share))
    return found + [Row(environment=environment, **fields) for fields in report[UNMEASURED]]


def _entry(benchmark: Mapping[str, Any], environment: Environment) -> Entry:
    info = benchmark["extra_info"]
    samples = Samples.of((1e3 * seconds for seconds in benchmark["stats"]["data"]), info[COLD])
    row = with_times(Row(environment=environment, **info[ROW]), samples)
    return dataclasses.replace(row, gbps=info[BYTES] / samples.median / 1e6 if info[BYTES] else None), info


def _fastest_of_ways(entries: list[Entry]) -> list[Entry]:
    fastest: dict[str, Row] = {}
    for row, info in entries:
        if info[FASTEST] and (row.case not in fastest or (row.p50_ms or 0) < (fastest[row.case].p50_ms or 0)):
            fastest[row.case] = row
    return [(row, info) for row, info in entries if not info[FASTEST] or row is fastest[row.case]]


def _with_ratios(row: Row, info: Mapping[str, Any], entries: list[Entry]) -> Row:
    """The library's to all that took turns with it, each other one's to the library; and to the machine's bandwidth."""
    if row.subject == MACHINE:
        return row
    case = {other.subject: of for other, of in entries if other.case == row.case and of[RATIO]}
    if row.subject == LIBRARY:
        ratios = {name: of[RATIO] for name, of in case.items() if name != MACHINE}
    else:
        ratios = {LIBRARY: 1 / info[RATIO]}
    row = dataclasses.replace(row, ratios=ratios)
    if MACHINE not in case:
        return row
    machine, of_library = case[MACHINE], 1.0 if row.subject == LIBRARY else info[RATIO]
    in_turn = info[BYTES] / machine[BYTES] / machine[RATIO] * of_library
    return dataclasses.replace(row, bandwidth_fraction_in_turn=in_turn)
