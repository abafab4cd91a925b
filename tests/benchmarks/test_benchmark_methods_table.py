"""The table of docs/methods.md says what the rows say."""

import dataclasses

from benchmarks import methods_table, rows
from benchmarks.rows import Row

ENVIRONMENT = rows.Environment("r", "2026-01-01", "c0ffee", "a CPU", 2, "2.13", "2", "0")


def row(op, subject, tasks, p50_ms, **fields):
    return Row("method", f"{op} T={tasks}", op, subject, ENVIRONMENT, T=tasks, N=100, p50_ms=p50_ms, **fields)


ROWS = [
    row("read twice", "machine", 2, 1.5),
    row("UPGrad.aggregation", "fastpcgrad", 2, 2.0, ratios={"torchjd": 0.1}),
    row("UPGrad.aggregation", "torchjd", 2, 20.0, ratios={"fastpcgrad": 10.0}, subject_version="0.18"),
    row("UPGrad.weights", "fastpcgrad", 2, 0.012, ratios={"torchjd": 0.8}),
    row("UPGrad.weights", "torchjd", 2, 0.015, ratios={"fastpcgrad": 1.25}),
    row("GradDrop.aggregation", "fastpcgrad", 2, 30.0, ratios={"torchjd": 2.0}),
    row("GradDrop.aggregation", "torchjd", 2, 15.0, ratios={"fastpcgrad": 0.5}),
]


def test_each_method_has_a_line_with_both_times_and_the_factors():
    lines = methods_table.table(ROWS).splitlines()
    assert lines[0] == "| method | weights, µs, T=2 | aggregation, ms, T=2 |"
    assert lines[2:5] == [
        "| `GradDrop` |  | 30 (0.5×) |",
        "| `UPGrad` | 12 (1.25×) | 2 (10×) |",
        "| *J read twice* |  | 1.5 |",
    ]
    assert "weights: 0 of 1 at least 5 times as fast as TorchJD, 0 slower" in lines[6]
    assert "aggregation: 1 of 2 at least 5 times as fast as TorchJD, 1 slower" in lines[6]
    assert "a CPU" in lines[8] and "c0ffee" in lines[8] and "TorchJD 0.18" in lines[8] and "N=100" in lines[8]


def test_without_a_peer_there_is_no_factor():
    missing = row("UPGrad.aggregation", "torchjd", 2, None, status="missing: x")
    found = methods_table.table([dataclasses.replace(ROWS[1], ratios={}), missing])
    assert "| `UPGrad` |  | 2 |" in found and "times as fast" not in found


def test_the_page_is_what_the_rows_give():
    page = methods_table.PAGE.read_text(encoding="utf-8")
    assert methods_table.written(page, rows.latest(rows.read(methods_table.RESULTS))) == page
    assert methods_table.table([]) == "Not yet measured."
