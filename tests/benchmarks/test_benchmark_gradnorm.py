"""GradNorm's benchmark: who is timed agrees with the double backward, and rows have the ratios."""

import pytest

from benchmarks import gradnorm, targets
from benchmarks.rows import SKIPPED_LATE, environment
from benchmarks.session import Run
from benchmarks.timing import Plan

SMALL = gradnorm.Case(3, 8)


@pytest.fixture
def run():
    return Run(environment(threads=1), quick=True)


def test_the_subjects_agree_and_a_disagreement_is_noticed(monkeypatch, run):
    assert gradnorm.disagreement(SMALL) < 1e-9
    monkeypatch.setattr(gradnorm.gradnorm_double_backward, "_norm", lambda weighted, _: 1 / weighted)
    assert gradnorm.disagreement(SMALL) > 1e-5
    with pytest.raises(RuntimeError, match="off those of the double backward"):
        gradnorm.rows(run, SMALL, Plan(0.0, least=1, most=1))


def test_rows_carry_the_ratios(run):
    measured = gradnorm.rows(run, SMALL, Plan(0.0, least=2, most=2))
    assert [row.subject for row in measured] == list(gradnorm.SUBJECTS)
    for row in measured:
        assert row.T == 3 and 1 <= row.rounds <= 2 and row.p20_ms <= row.p50_ms <= row.p80_ms
        assert set(row.ratios) == set(gradnorm.SUBJECTS) - {row.subject}
    (verdict,) = targets.verdicts(measured, targets.GRADNORM)
    assert verdict.worst == 1 / measured[0].ratios["double backward"]


def test_what_comes_too_late_gets_rows_that_say_so(run):
    run.allow(minutes=-1)
    gradnorm.measure(run, gradnorm.cases(run.quick))
    assert len(run.rows) == 2 * len(gradnorm.SUBJECTS)
    assert all(row.status == SKIPPED_LATE and row.p50_ms is None for row in run.rows)
