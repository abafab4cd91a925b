"""GradNorm's benchmark: who is timed agrees with the double backward, and rows can be read again."""

import pytest

pytest.importorskip("rich")

from benchmarks import gradnorm, rows
from benchmarks.measure import Plan

SMALL = gradnorm.Case(3, 8)


def test_the_subjects_agree_and_a_disagreement_is_noticed(monkeypatch):
    assert gradnorm.disagreement(SMALL) < 1e-9
    monkeypatch.setattr(gradnorm.gradnorm_double_backward, "_norm", lambda weighted, _: 1 / weighted)
    assert gradnorm.disagreement(SMALL) > 1e-5


def test_rows_carry_the_ratios_and_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gradnorm, "CASES", (SMALL,))
    monkeypatch.setattr(gradnorm, "Plan", lambda *_, **__: Plan(0.0, least=2, most=2))
    path = tmp_path / "gradnorm.jsonl"
    measured = gradnorm.main(["--quick", "--threads", "1", "--append", "--results", str(path)])
    assert [row.subject for row in rows.read(path)] == list(gradnorm.SUBJECTS)
    for row in measured:
        assert row.T == 3 and 1 <= row.rounds <= 2 and row.p20_ms <= row.p50_ms <= row.p80_ms
        assert set(row.ratios) == set(gradnorm.SUBJECTS) - {row.subject}


def test_what_comes_too_late_gets_rows_that_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradnorm, "MINUTES", -1.0)
    path = tmp_path / "gradnorm.jsonl"
    measured = gradnorm.main(["--quick", "--threads", "1", "--append", "--results", str(path)])
    assert len(measured) == 2 * len(gradnorm.SUBJECTS)
    assert all(row.status.startswith("skipped") and row.p50_ms is None for row in rows.read(path))
    assert "T=10 width=100: skipped" in capsys.readouterr().out
