"""The GPU benchmark of the methods, on the CPU and on small J."""

import pytest

from benchmarks import gpu, gpu_methods, gpu_timing, method_cases, rows

ENVIRONMENT = rows.Environment("r", "2026-01-01", "c", "a GPU", 1, "2", "2", "0")


@pytest.fixture
def run(monkeypatch):
    for module in (gpu_methods, gpu_timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_methods, "WIDTH", 64)
    return gpu.Run(ENVIRONMENT, minutes=1.0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a peer's solver
def test_every_method_is_compared_with_torchjds(run, monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.setattr(method_cases, "TASKS", (3,))
    gpu_methods.measure(run)
    assert all(row.ok for row in run.rows), [row.status for row in run.rows if not row.ok]
    assert [row.subject for row in run.rows] == ["fastpcgrad", "torchjd"] * len(method_cases.names(3))
    for own, their in zip(run.rows[::2], run.rows[1::2], strict=True):
        assert own.case == their.case and their.ratios == {"fastpcgrad": their.p50_ms / own.p50_ms}
    *lines, last = gpu_methods.summary(run.rows)
    assert len(lines) == len(method_cases.names(3)) and lines[0].startswith(run.rows[0].case)
    assert f"of {len(lines)} slower" in last


def test_what_is_missing_or_fails_has_a_row_that_says_so(run, monkeypatch):
    def theirs(name, tasks, dtype, device):
        if name == "Sum":
            raise ImportError("no such peer")
        return lambda grads: 1 // 0

    monkeypatch.setattr(method_cases, "TASKS", (2,))
    monkeypatch.setattr(method_cases, "names", lambda tasks: ["Mean", "Sum"])
    monkeypatch.setattr(method_cases, "theirs", theirs)
    gpu_methods.measure(run)
    assert [row.status for row in run.rows] == [
        "ok",
        "failed: ZeroDivisionError: integer division or modulo by zero",
        "ok",
        "missing: no such peer",
    ]
    assert not list(gpu_methods.summary(run.rows))


def test_after_the_deadline_nothing_is_measured(run, capsys):
    run._deadline = 0.0
    gpu_methods.measure(run)
    assert not run.rows and "the time was up" in capsys.readouterr().out
