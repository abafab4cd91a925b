"""The methods that are compared with TorchJD's."""

import inspect

import pytest
import torch

from benchmarks import method_cases
from fastpcgrad import methods


def test_every_method_has_a_case():
    concrete = {
        name
        for name, found in vars(methods).items()
        if inspect.isclass(found) and issubclass(found, methods.Method) and not inspect.isabstract(found)
    }
    others = {name for name in concrete if issubclass(getattr(methods, name), method_cases.OF_MORE_THAN_ONE_J)}
    assert set(method_cases.names()) == concrete - others


@pytest.mark.parametrize("tasks", method_cases.TASKS)
@pytest.mark.parametrize("name", method_cases.names())
def test_every_method_merges(name, tasks):
    if name not in method_cases.names(tasks):
        pytest.skip("needs more tasks")
    grads = method_cases.task_gradients(tasks, 50, torch.float64)
    merged = method_cases.library_call(name, "aggregation", grads)()
    assert merged.shape == (50,) and merged.isfinite().all()


@pytest.mark.parametrize("tasks", method_cases.TASKS)
def test_the_task_gradients_conflict(tasks):
    grads = method_cases.task_gradients(tasks, 10_000)
    products = grads @ grads.mT
    assert (products[~torch.eye(tasks, dtype=torch.bool)] < 0).double().mean() > 0.9


@pytest.mark.parametrize("name", ["PCGrad", "Mean", "TrimmedMean"])
def test_both_sides_merge_the_same(name):
    pytest.importorskip("torchjd")
    assert method_cases.apart(name, 3) < 1e-12


def test_both_sides_weights_are_those_of_the_same_rows():
    pytest.importorskip("torchjd")
    grads = method_cases.task_gradients(3, 50, torch.float64)
    for side in (method_cases.library_call, method_cases.peer_call):
        torch.testing.assert_close(side("Mean", "weights", grads)(), torch.full((3,), 1 / 3, dtype=torch.float64))
    with pytest.raises(AttributeError):
        method_cases.peer_call("TrimmedMean", "weights", grads)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # TorchJD's, of cvxpy
@pytest.mark.parametrize("name", ["NashMTL", "MGDA", "UPGrad", "IMTLG"])
def test_both_sides_weigh_the_same(name):
    pytest.importorskip("torchjd")
    pytest.importorskip({"NashMTL": "cvxpy", "UPGrad": "quadprog"}.get(name, "torchjd"))
    grads = method_cases.task_gradients(3, 40, torch.float64)
    own, theirs = (make(name, "weights", grads)() for make in (method_cases.library_call, method_cases.peer_call))
    torch.testing.assert_close(own, theirs.double(), rtol=1e-3, atol=1e-6)
