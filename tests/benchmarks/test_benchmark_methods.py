"""The benchmark of the methods, on rows small enough to be timed here."""

import inspect

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from benchmarks import method_cases
from benchmarks import methods as benchmark
from benchmarks.measure import Plan
from benchmarks.rows import environment, from_json, to_json
from benchmarks.session import Session
from fastpcgrad import methods
from fastpcgrad.methods.elementwise import Elementwise


@pytest.fixture
def session():
    return Session(environment(threads=torch.get_num_threads()), quick=True, console=Console(quiet=True))


def test_every_method_has_a_case():
    concrete = {
        name
        for name, found in vars(methods).items()
        if inspect.isclass(found) and issubclass(found, methods.Method) and not inspect.isabstract(found)
    }
    assert set(method_cases.names()) == concrete


@pytest.mark.parametrize("tasks", method_cases.TASKS)
@pytest.mark.parametrize("name", method_cases.names())
def test_every_method_merges(name, tasks):
    if name not in method_cases.names(tasks):
        pytest.skip("needs more tasks")
    grads = method_cases.task_gradients(tasks, 50, torch.float64)
    merged = method_cases.aggregate(method_cases.ours(name, tasks), grads)
    assert merged.shape == (50,) and merged.isfinite().all()


@pytest.mark.parametrize("tasks", method_cases.TASKS)
def test_the_task_gradients_conflict(tasks):
    grads = method_cases.task_gradients(tasks, 10_000)
    products = grads @ grads.mT
    assert (products[~torch.eye(tasks, dtype=torch.bool)] < 0).double().mean() > 0.9


def test_rows_carry_the_ratio_to_torchjd(session):
    pytest.importorskip("torchjd")
    grads = method_cases.task_gradients(3, 100)
    measured = benchmark.measure("PCGrad", grads, session, Plan(0.0, least=2, most=2))
    assert [(row.op, row.subject) for row in measured] == [
        ("PCGrad.aggregation", "fastpcgrad"),
        ("PCGrad.aggregation", "torchjd"),
        ("PCGrad.weights", "fastpcgrad"),
        ("PCGrad.weights", "torchjd"),
    ]
    assert all(row.ok and row.rounds == 2 and row.ratios for row in measured)
    assert from_json(to_json(measured[0])).T == 3
    assert benchmark.apart("PCGrad", 3) < 1e-12
    benchmark.show(session.console, measured)


def test_a_peer_that_is_missing_gets_a_row_that_says_so(session, monkeypatch):
    def missing(name, tasks, dtype):
        raise ImportError("no such peer")

    monkeypatch.setattr(method_cases, "theirs", missing)
    measured = benchmark.measure("PCGrad", method_cases.task_gradients(3, 100), session, Plan(0.0, least=2, most=2))
    assert {row.subject: row.status for row in measured} == {"fastpcgrad": "ok", "torchjd": "missing: no such peer"}
    benchmark.show(session.console, measured)


def test_methods_on_columns_have_no_weights(session, monkeypatch):
    class Middle(Elementwise):
        def merge_rows(self, rows, out):
            out.copy_(torch.stack(rows).median(dim=0).values)

    monkeypatch.setattr(methods, "Middle", Middle, raising=False)
    monkeypatch.setattr(methods, "__all__", [*methods.__all__, "Middle"])
    measured = benchmark.measure("Middle", method_cases.task_gradients(3, 100), session, Plan(0.0, least=2, most=2))
    assert [row.status.partition(":")[0] for row in measured] == ["ok", "missing"]
    assert {row.op for row in measured} == {"Middle.aggregation"}
    benchmark.show(session.console, measured)


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "Nothing"])
    assert "Nothing" in capsys.readouterr().err


def test_what_is_not_begun_in_time_is_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "MINUTES", -1.0)
    monkeypatch.setattr(benchmark, "task_gradients", lambda tasks, width: torch.ones(tasks, 1))
    benchmark.main(["--quick", "--threads", "1", "--only", "Krum"])
    assert "not begun within -1 minutes: Krum T=8, Krum T=32" in capsys.readouterr().out
