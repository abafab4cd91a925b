"""The schema of the rows: what is written can be read, and unknown rows are refused."""

import json
from dataclasses import replace

import pytest

from benchmarks import rows
from benchmarks.rows import Environment, Row
from benchmarks.session import Run

ENVIRONMENT = Environment(
    run="20260102T030405Z", date="2026-01-02", commit="0123456789ab", device="Some CPU, 2 cores", threads=2,
    torch="2.13.0", numpy="2.4.0", fastpcgrad="0.1.0",
)  # fmt: skip
ROW = Row(
    kind="kernel", case="gram T=2 N=2^20 float32 contiguous", op="gram", subject="fastpcgrad",
    environment=ENVIRONMENT, backend="cpu", T=2, N=1 << 20, dtype="float32", layout="contiguous", rounds=7,
    p20_ms=1.0, p50_ms=1.5, p80_ms=2.0, ratios={"torch": 0.25}, gbps=12.5, bandwidth_fraction=0.5,
)  # fmt: skip


def test_a_row_survives_the_file(tmp_path):
    skipped = Row(
        kind="kernel",
        case="x",
        op="pcgrad",
        subject="loop",
        environment=ENVIRONMENT,
        status="skipped: budget (9 s)",
    )
    path = tmp_path / "rows.jsonl"
    rows.append([ROW], path)
    rows.append([skipped], path)
    assert rows.read(path) == [ROW, skipped]
    assert not skipped.ok and ROW.ok


def test_appending_never_changes_earlier_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append([ROW], path)
    before = path.read_text()
    rows.append([ROW, ROW], path)
    assert path.read_text().startswith(before)


def test_every_line_says_where_and_on_what():
    line = json.loads(rows.to_json(ROW))
    for name in ("date", "commit", "device", "threads", "torch", "numpy", "fastpcgrad", "run", "schema"):
        assert name in line
    assert "peak_bytes" not in line, "what was not measured is left out"


def test_numbers_are_kept_to_five_digits():
    row = replace(ROW, p50_ms=1.23456789, ratios={"torch": 0.333333333})
    line = json.loads(rows.to_json(row))
    assert line["p50_ms"] == 1.2346 and line["ratios"] == {"torch": 0.33333}


@pytest.mark.parametrize("change", [{"schema": 99}, {"surprise": 1}])
def test_an_unknown_row_is_refused(change):
    line = json.dumps(json.loads(rows.to_json(ROW)) | change)
    with pytest.raises(ValueError, match=next(iter(change))):
        rows.from_json(line)


def test_latest_is_the_run_that_was_appended_last():
    newer = replace(ROW, environment=replace(ENVIRONMENT, run="20260103T000000Z"))
    assert rows.latest([ROW, newer, newer]) == [newer, newer]
    assert rows.latest([]) == []


def test_the_environment_of_this_machine_is_complete():
    environment = rows.environment(threads=2)
    assert all(str(value) for value in vars(environment).values())


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert rows.commit() == "unknown"


@pytest.mark.parametrize("path", sorted(rows.RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_results_can_be_read(path):
    found = rows.read(path)
    assert found and all(row.case and row.subject for row in found)


def test_a_run_keeps_its_rows_and_appends_them_at_once(tmp_path, capsys):
    run = Run(ENVIRONMENT, results=tmp_path / "rows.jsonl")
    row = run.row("kernel", "x", "gram", "fastpcgrad", T=2)
    assert (row.environment, row.dtype, row.T) == (ENVIRONMENT, "float32", 2)
    run.add([row])
    run.add([replace(row, status="wrong: very")])
    assert rows.read(tmp_path / "rows.jsonl") == run.rows and len(run.rows) == 2
    run.show_failures()
    assert capsys.readouterr().out.strip() == "kernel x fastpcgrad : wrong: very"


def test_a_run_is_late_when_its_time_is_up():
    run = Run(ENVIRONMENT)
    assert not run.late
    run.allow(minutes=-1)
    assert run.late
