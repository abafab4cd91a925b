"""What pytest-benchmark measures of calls, on cases small enough to be timed here, and the rows that come of it."""

import json

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import bandwidth, cases, kernels, method_cases, run, saved, test_kernels
from benchmarks.cases import KernelCase
from benchmarks.rows import SKIPPED_LATE, Environment, from_json, read, to_json
from benchmarks.session import Run
from benchmarks.timing import Plan

ENVIRONMENT = Environment("r", "2026-01-01", "c", "a CPU", 1, "2", "2", "0")
CASES = [KernelCase(op, 3, 1000) for op in cases.OPS]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The rows of a file of ``benchmarks`` by pytest in this process, and its exit status."""
    monkeypatch.setattr(cases, "kernel_cases", lambda quick: CASES)
    monkeypatch.setattr(bandwidth, "ELEMENTS", {"cpu": 1 << 12})
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)  # which takes seconds to find out
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # nothing is measured beside other tests
    monkeypatch.setattr(method_cases, "TASKS", (3,))
    monkeypatch.setattr(method_cases, "names", lambda tasks: ["PCGrad", "TrimmedMean"])

    def measure(file, *options):
        report = tmp_path / "report.json"
        status = pytest.main(
            [f"benchmarks/{file}", "--benchmark-only", "--quick", "--threads", "1", "-q",
             "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
             "--benchmark-max-time=0.01", f"--benchmark-json={report}", *options]
        )  # fmt: skip
        text = report.read_text() if report.exists() else None
        return saved.rows(json.loads(text), ENVIRONMENT) if text else [], status

    before = torch.get_num_threads()
    yield measure
    assert torch.get_num_threads() == before


def by(found, **fields):
    return [row for row in found if all(getattr(row, name) == value for name, value in fields.items())]


def test_kernel_rows_carry_ratios_to_every_peer(measured, monkeypatch, capsys):
    monkeypatch.setattr(test_kernels, "STREAMING", 15_000)  # gram moves less, combine and mix_ more
    found, status = measured("test_kernels.py")
    assert status == 0 and [row.op for row in by(found, kind="bandwidth")] == ["read", "copy"]
    for case in CASES:
        ours, *others = by(found, case=case.label)
        assert ours.ok and ours.subject == "fastpcgrad" and ours.rounds >= 5
        assert ours.p20_ms <= ours.p50_ms <= ours.p80_ms and from_json(to_json(ours)).T == 3
        assert (
            set(ours.ratios)
            == {row.subject for row in others if row.ok}
            >= ({"torch"} if case.op != "pcgrad" else {"loop"})
        )
        for row in others:
            if row.ok:
                assert row.ratios == {"fastpcgrad": pytest.approx(1 / ours.ratios[row.subject])}
        streams = case.op in ("combine", "mix_")
        assert (ours.gbps is not None) == (ours.bandwidth_fraction is not None) == (streams or case.op == "pcgrad")
        assert (ours.bandwidth_fraction_in_turn is not None) == streams
    assert "benchmark 'combine T=3" in capsys.readouterr().out, "a group a case"


def test_who_is_wrong_gets_no_numbers_and_fails(measured, monkeypatch):
    monkeypatch.setitem(kernels.TORCH_OPS, "gram", lambda x: lambda: x.rows @ x.rows.T * 1.01)
    found, status = measured("test_kernels.py", "-k", "gram")
    (wrong,) = by(found, subject="torch")
    assert status == 1 and wrong.status.startswith("wrong: ") and wrong.p50_ms is None
    (ours,) = by(found, subject="fastpcgrad")
    assert ours.ok and "torch" not in ours.ratios


def test_who_cannot_be_had_or_costs_too_much_says_so(measured, monkeypatch):
    absent = kernels.Peer("torchjd", "absent", "absent_peer", "torchjd", 0, False)
    loop = next(peer for peer in kernels.PEERS if peer.name == "loop")
    monkeypatch.setattr(kernels, "PEERS", (absent, loop))
    twice = [KernelCase("pcgrad", 3, 1000), KernelCase("pcgrad", 3, 3000)]
    monkeypatch.setattr(cases, "kernel_cases", lambda quick: twice)
    monkeypatch.setattr("benchmarks.conftest.ONE_CALL", 0.0)
    found, status = measured("test_kernels.py", "-k", "pcgrad")
    assert status == 0 and {row.status for row in by(found, subject="torchjd")} == {
        "missing: No module named 'benchmarks.peers.absent_peer'"
    }
    assert [row.status.partition(" (")[0] for row in by(found, subject="loop")] == ["ok", "skipped: budget"]


def test_a_call_that_is_too_slow_for_a_second_is_timed_cold(measured, monkeypatch):
    monkeypatch.setattr(test_kernels, "Plan", lambda *_, **__: Plan(0.0, least=5, most=5, slow=0.0, cold=1e-9))
    twice = [KernelCase("pcgrad", 3, 1000), KernelCase("pcgrad", 4, 1000)]
    monkeypatch.setattr(cases, "kernel_cases", lambda quick: twice)
    found, _ = measured("test_kernels.py", "-k", "pcgrad")
    assert [(row.cold, row.rounds) for row in by(found, subject="loop")] == [(False, 1), (True, 1)]


def test_what_has_not_begun_in_time_says_so(measured):
    found, status = measured("test_kernels.py", "--minutes=-1")
    assert status == 0 and not found, "without any number there is no report"


def test_method_rows_carry_the_ratio_to_torchjd_and_the_floor(measured):
    pytest.importorskip("torchjd")
    found, status = measured("test_methods.py")
    assert status == 0 and all(row.ok for row in found)
    assert sorted((row.op, row.subject) for row in found) == [
        ("PCGrad.aggregation", "fastpcgrad"),
        ("PCGrad.aggregation", "torchjd"),
        ("PCGrad.weights", "fastpcgrad"),
        ("PCGrad.weights", "torchjd"),
        ("TrimmedMean.aggregation", "fastpcgrad"),
        ("TrimmedMean.aggregation", "torchjd"),
        ("read twice", "machine"),
    ]
    own, their = by(found, op="PCGrad.weights")
    assert own.ratios == {"torchjd": pytest.approx(1 / their.ratios["fastpcgrad"])} and "apart" in own.note


def test_a_method_that_the_peer_lacks_has_a_row_that_says_so(measured, monkeypatch):
    def missing(*_):
        raise ImportError("no such peer")

    monkeypatch.setattr(method_cases, "theirs", missing)
    found, status = measured("test_methods.py", "-k", "aggregation")
    assert status == 0
    assert [row.status for row in by(found, subject="torchjd")] == 2 * ["missing: no such peer"]
    assert all(row.ok and not row.ratios for row in by(found, subject="fastpcgrad"))


def test_a_report_that_was_cut_short_still_gives_rows():
    report = {"benchmarks": [], saved.UNMEASURED: [{"kind": "kernel", "case": "x", "op": "gram", "subject": "torch",
                                                    "status": SKIPPED_LATE}]}  # fmt: skip
    (row,) = saved.rows(report, ENVIRONMENT)
    assert (row.status, row.environment) == (SKIPPED_LATE, ENVIRONMENT)


def test_the_runner_appends_the_rows_of_each_part_to_its_file(monkeypatch, tmp_path, capsys):
    def measure(kind, op):
        def measured(run, minutes, options):
            run.add([run.row(kind, f"{op} T=2 N=2^20 float32 contiguous", op, "fastpcgrad", T=2, N=100, p50_ms=1.0)])
            assert (minutes, options) == (1.0, ["-k", "x"])
            return kind == "kernel"

        return measured

    parts = {
        "kernel": run.Part("cpu", 1.0, measure("kernel", "gram")),
        "method": run.Part("methods", 1.0, measure("method", "PCGrad.weights")),
    }
    monkeypatch.setattr(run, "PARTS", parts)
    arguments = ["--only", "kernel", "--only", "method", "--append", "--results", str(tmp_path), "--", "-k", "x"]
    assert run.main(arguments) == 1, "one part did not go well"
    assert [row.op for name in ("cpu", "methods") for row in read(tmp_path / f"{name}.jsonl")] == [
        "gram",
        "PCGrad.weights",
    ]
    assert "| `PCGrad` |" in capsys.readouterr().out


def test_a_part_measured_here_is_told_when_to_end_and_says_who_failed():
    late = []

    def measure(run):
        late.append(run.late)
        run.add([run.row("step", "x", "step", "loop", status="failed: so")])

    assert not run.here(measure)(Run(ENVIRONMENT), -1.0, ()) and late == [True]
