"""The benchmark below T backward passes: one loss a sample, tables that are looked up, and what is shown of them."""

import pytest
import torch

from benchmarks import cases, modes, plot, samples, steps, tables, targets
from benchmarks.cases import Batch
from benchmarks.rows import SKIPPED_LATE, environment
from benchmarks.session import Run
from benchmarks.timing import Plan

TWICE = Plan(0.0, least=2, most=2)
SMALL = samples.Case((6, 8, 3), 5)


@pytest.fixture
def run():
    return Run(environment(threads=1), quick=True)


def test_rows_of_samples_carry_both_ratios_and_are_shown(run):
    run.add(samples.rows(run, SMALL, TWICE))
    assert [row.subject for row in run.rows] == list(samples.SUBJECTS)
    for row in run.rows:
        assert row.ok and row.T == 5 and row.p50_ms < row.whole_p50_ms
        assert set(row.ratios) == set(row.whole_ratios) == set(samples.SUBJECTS) - {row.subject}
    gram, step, _ = targets.verdicts(run.rows, targets.FLOOR)
    found = {row.subject: row for row in run.rows}
    assert gram.worst == 1 / found[samples.GRAM].ratios[samples.ENGINE]
    assert step.worst == found[samples.WHOLE].whole_ratios[samples.PLAIN]
    assert "| 6-8-3 B=5 |" in tables.floor(run.rows)


def test_a_gram_matrix_that_is_wrong_gets_no_numbers(run, monkeypatch):
    monkeypatch.setitem(samples.SUBJECTS, samples.ENGINE, lambda own: lambda losses: torch.eye(len(losses)))
    found = {row.subject: row for row in samples.rows(run, SMALL, TWICE)}
    assert found[samples.ENGINE].status.startswith("wrong") and found[samples.GRAM].ok


def test_what_comes_too_late_gets_rows_that_say_so(run):
    run.allow(minutes=-1)
    samples.measure(run, samples.cases(quick=True))
    assert [row.status for row in run.rows] == [SKIPPED_LATE] * len(samples.SUBJECTS)


def test_tables_are_timed_and_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setitem(cases.TABLES, "recommender dense V=100000", (100, False))
    case, dense = (cases.FloorCase(f"recommender {name}", 2, Batch(4)) for name in ("V=3000", "dense V=100000"))
    run.add(steps.rows(run, case, TWICE))
    run.add(steps.rows(run, dense, TWICE))
    run.add(steps.rows(run, cases.FloorCase("mlp w=256", 2, Batch(4)), TWICE))
    assert {row.subject for row in run.rows if row.case == case.label} == {"plain", "fastpcgrad", modes.DENSE_ROWS}
    assert all(row.ok for row in run.rows)
    shown = tables.floor(run.rows)
    assert "| sparse | V=3000 T=2 B=4 |" in shown and "| dense | V=100000 T=2 B=4 |" in shown and "mlp" not in shown
    pytest.importorskip("matplotlib")
    (path,) = plot.draw_floor(run.rows, tmp_path)
    assert path.stat().st_size > 0


def test_nothing_is_shown_without_rows(tmp_path):
    assert tables.floor([]) == "" and plot.draw_floor([], tmp_path) == []
