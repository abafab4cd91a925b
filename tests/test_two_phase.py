"""Surgery in two phases: the numbers of the ordinary way, less memory, and what it refuses."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import memory
from fastpcgrad import methods, reference
from fastpcgrad.merging.by_rows import merge
from fastpcgrad.merging.two_phase import merge_in_two_phases
from fastpcgrad.rows.parameters import Division
from fastpcgrad.rows.task_gradients import TaskGradients
from tests import graph_models
from tests.linear_problems import random_problem

for_every_model = pytest.mark.parametrize("kind", graph_models.MODELS, ids=lambda kind: kind.__name__)
METHODS = {
    "paper": lambda: methods.PCGrad(generator=torch.Generator().manual_seed(2)),
    "drop-in": lambda: methods.PCGrad("pytorch-pcgrad", generator=random.Random(2)),
    "libmtl": lambda: methods.PCGrad("libmtl", generator=random.Random(2)),
    "UPGrad": methods.UPGrad,
    "MGDA": methods.MGDA,
}


@pytest.fixture
def any_share(monkeypatch):
    """Small models have parameters that are more than half of them."""
    monkeypatch.setattr("fastpcgrad.merging.two_phase._check_held", lambda *_: None)


def rows_of(losses, parameters):
    return [list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)) for loss in losses]


def ordinary(losses, parameters, method, shared=None):
    grads = TaskGradients(parameters)
    for t, row in enumerate(rows_of(losses, parameters)):
        grads.put(t, row)
    return merge(grads, method, Division(shared), in_place=False)


def flat(grads):
    return torch.cat([g.double().flatten() for g in grads if g is not None])


def assert_merged_close(found, expected, weights, rows, tolerance):
    """The measure that all comparisons use: relative to the sum of what is merged."""
    assert [g is None for g in found] == [g is None for g in expected]
    scale = sum(abs(w) * flat(row).norm() for w, row in zip(weights.tolist(), rows, strict=True))
    assert (flat(found) - flat(expected)).norm() <= tolerance * scale


@for_every_model
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_ordinary_way(kind, name, any_share):
    model = kind().double()
    parameters = list(model.parameters())
    for tasks in (1, 2, 3, 5):
        losses = model(tasks)
        expected_report, expected = ordinary(losses, parameters, METHODS[name]())
        report, found = merge_in_two_phases(losses, parameters, METHODS[name]())
        torch.testing.assert_close(report.gram, expected_report.gram)
        torch.testing.assert_close(report.weights, expected_report.weights)
        assert report.tasks == expected_report.tasks
        assert [g is None for g in found] == [g is None for g in expected]
        torch.testing.assert_close(flat(found), flat(expected))
        assert all(p.grad is None for p in parameters)


@for_every_model
def test_single_precision_is_within_the_common_tolerance_of_the_oracle(kind, any_share):
    """Against the oracle on float64 gradients of the same float32 model; what the float32 rows lost is allowed too."""
    model = kind()
    parameters = list(model.parameters())
    losses = model(4)
    single = rows_of(losses, parameters)
    report, found = merge_in_two_phases(losses, parameters, methods.PCGrad("tensorflow"))
    double = kind().double()
    double.load_state_dict(model.state_dict())
    double_parameters = list(double.parameters())
    double.x = model.x.double()
    rows = rows_of(double(4), double_parameters)
    lost = max((flat(s) - flat(r)).norm() / flat(r).norm() for s, r in zip(single, rows, strict=True))
    expected = reference.merge(rows, double_parameters, "tensorflow")
    assert_merged_close(found, expected, report.weights, rows, 1e-6 + 2 * lost)


@pytest.mark.parametrize("variant", ["paper", "pytorch-pcgrad", "tensorflow", "torchjd", "libmtl"])
def test_any_presence_is_the_oracles(variant, any_share):
    for seed in range(40):
        problem = random_problem(seed)
        parameters = problem.parameters(torch.float64)
        method = methods.PCGrad(variant, generator=random.Random(seed))
        if any(all(g is None for g in gradients) for gradients in problem.gradients):
            with pytest.raises(ValueError, match="reach none of the parameters"):
                merge_in_two_phases(problem.losses(parameters), parameters, method)
            continue
        _, found = merge_in_two_phases(problem.losses(parameters), parameters, method)
        expected = reference.merge(problem.gradients, parameters, variant, random.Random(seed))
        assert [g is None for g in found] == [g is None for g in expected]
        for f, e in zip(found, expected, strict=True):
            if e is not None:
                torch.testing.assert_close(f, e)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_that_are_not_shared_are_summed(name):
    model = graph_models.Heads().double()
    parameters = list(model.parameters())
    shared = [index % 3 != 0 for index in range(len(parameters))]
    losses = model(3)
    expected_report, expected = ordinary(losses, parameters, METHODS[name](), shared)
    report, found = merge_in_two_phases(losses, parameters, METHODS[name](), division=Division(shared))
    torch.testing.assert_close(report.gram, expected_report.gram)
    torch.testing.assert_close(flat(found), flat(expected))


def test_half_precision_parameters():
    model = graph_models.Residual().to(torch.bfloat16)
    parameters = list(model.parameters())
    losses = model(3)
    rows = rows_of(losses, parameters)
    report, found = merge_in_two_phases(losses, parameters, methods.UPGrad(), retain_graph=True)
    _, expected = ordinary(losses, parameters, methods.UPGrad())
    assert all(g.dtype == torch.bfloat16 for g in found)
    assert_merged_close(found, expected, report.weights, rows, 2e-2)


@pytest.mark.parametrize("name", ["MLP", "Heads"])
def test_backward_passes_within_autocast(name):
    """Which round what a forward pass in single precision has left in theirs."""
    model, method = getattr(graph_models, name)().float(), methods.Constant([0.5, -1.0, 2.0])
    parameters = list(model.parameters())
    losses = model(3)
    _, expected = ordinary(losses, parameters, method)
    with torch.autocast("cpu", torch.bfloat16):
        report, found = merge_in_two_phases(losses, parameters, method, retain_graph=True)
    assert_merged_close(found, expected, report.weights, rows_of(losses, parameters), 2e-2)


def test_parameters_of_several_dtypes(any_share):
    model = graph_models.MLP()
    model.layers[2].double()
    h = model.x
    for layer in model.layers:
        h = layer(h.to(layer.weight.dtype)).tanh()
    losses, parameters = graph_models.losses_of(h, 3), list(model.parameters())
    report, found = merge_in_two_phases(losses, parameters, methods.Sum(), retain_graph=True)
    rows = rows_of(losses, parameters)
    exact = torch.stack([flat(row) for row in rows])
    torch.testing.assert_close(report.gram, exact @ exact.T, rtol=1e-6, atol=0)
    assert [g.dtype for g in found] == [p.dtype for p in parameters]
    torch.testing.assert_close(flat(found), exact.sum(dim=0), rtol=1e-5, atol=1e-6)


def test_sparse_gradients(any_share):
    embedding = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    losses = [embedding(torch.tensor([0, 1])).sum(), -embedding(torch.tensor([1, 4])).sum()]
    rows = [[g.to_dense() for g in row] for row in rows_of(losses, [embedding.weight])]
    _, (merged,) = merge_in_two_phases(losses, [embedding.weight], methods.PCGrad("tensorflow"))
    expected = reference.merge(rows, [embedding.weight], "tensorflow")[0]
    assert merged.is_coalesced()
    torch.testing.assert_close(merged.to_dense(), expected)


def test_grad_and_hooks_of_others_are_left_alone():
    model = graph_models.MLP()
    parameters = list(model.parameters())
    parameters[0].grad = kept = torch.ones_like(parameters[0])
    frozen = model.layers[5].bias
    merge_in_two_phases(model(3), [p for p in parameters if p is not frozen], methods.Mean())
    assert parameters[0].grad is kept and (kept == 1).all()
    assert all(p.grad is None for p in parameters[1:])


def test_the_result_is_no_memory_of_the_graph():
    """A gradient that the graph keeps must not be what an optimizer scales in place."""
    weight = torch.ones(3, requires_grad=True)

    class Constant(torch.autograd.Function):
        kept = torch.full((3,), 2.0)

        @staticmethod
        def forward(ctx, x):
            return 2 * x.sum()

        @staticmethod
        def backward(ctx, grad):
            return Constant.kept.mul_(0).add_(2 * grad)

    _, (merged,) = merge_in_two_phases([Constant.apply(weight)], [weight], methods.Sum())
    merged.zero_()
    assert (Constant.kept == 2).all()


def test_the_graph_is_freed_unless_it_is_retained():
    model = graph_models.MLP()
    losses, parameters = model(3), list(model.parameters())
    _, first = merge_in_two_phases(losses, parameters, methods.Mean(), retain_graph=True)
    _, again = merge_in_two_phases(losses, parameters, methods.Mean())
    torch.testing.assert_close(flat(first), flat(again), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        merge_in_two_phases(losses, parameters, methods.Mean())


@pytest.mark.parametrize("method", [methods.PCGrad("tensorflow"), methods.MGDA(), methods.Krum(1)])
def test_what_is_not_finite_is_seen(method):
    """Even where the task has no weight: its overflow must reach the merged gradient."""
    model = graph_models.MLP()
    parameters = list(model.parameters())
    losses = model(4)
    losses[3] = losses[3] * torch.inf
    _, found = merge_in_two_phases(losses, parameters, method)
    assert not flat(found).isfinite().any() or not all(g.isfinite().all() for g in found)


def half_precision_losses(weights, factors):
    """On the way back a gradient is four times as large from layer to layer; the last one's is the factor."""
    h = torch.zeros_like(weights[0])
    for w in weights:
        h = h * 4 + w
    return [h.float().sum() * factor for factor in factors]


@pytest.mark.parametrize("factors", [(1e7, 2e7), (1.0, 1e7), (-1e7, 1e7)])
def test_an_overflow_that_the_weights_hide_is_seen(factors):
    """A row holds inf in fp16; the weighted losses' gradient does not."""
    weights = [torch.zeros(8, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    method = methods.Constant([1e-4, 1e-4])
    _, found = merge_in_two_phases(half_precision_losses(weights, factors), weights, method)
    assert all(g.isnan().all() for g in found)


def test_an_overflow_does_not_spoil_parameters_of_other_pieces():
    weights = [torch.zeros(8, dtype=torch.float16, requires_grad=True) for _ in range(8)]
    factors, by = [64.0, -16.0], [2.0**-6, 2.0**-7]
    rows = rows_of(half_precision_losses(weights, factors), weights)
    assert [g.isfinite().all().item() for g in rows[0]] == [False] * 3 + [True] * 5
    _, found = merge_in_two_phases(half_precision_losses(weights, factors), weights, methods.Constant(by))
    assert all(g.isnan().all() for g in found[:3])
    for layer, g in list(enumerate(found))[4:]:  # two tasks: a piece is half of the layers
        assert (g == (by[0] * factors[0] + by[1] * factors[1]) * 4.0 ** (7 - layer)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_only_rounding_errors_pass(dtype, any_share):
    """Biases before a normalisation, each in a piece of its own."""
    model = graph_models.Conv().to(dtype)
    parameters = [layer.bias for layer in model.layers] + [model.norms[4].weight]
    report, _ = merge_in_two_phases(model(5), parameters, methods.Mean())
    assert (report.norms > 0).all()


MEASURE = """
import torch
from benchmarks import memory
from fastpcgrad import methods
from fastpcgrad.merging.two_phase import merge_in_two_phases

def step(width):
    layers = [torch.nn.Linear(width, width) for _ in range(8)]
    parameters = [p for layer in layers for p in layer.parameters()]
    x = torch.randn(4, width)
    def run():
        h = x
        for layer in layers:
            h = layer(h).tanh()
        losses = [(h - t).square().mean() for t in range(4)]
        for p, g in zip(parameters, merge_in_two_phases(losses, parameters, methods.PCGrad())[1]):
            p.grad = g
    return parameters, run

torch.set_num_threads(1)
step(32)[1]()
parameters, run = step(1024)
with memory.watch() as peak:
    for _ in range(2):
        for p in parameters:
            p.grad = None
        run()
print(peak.bytes / sum(p.nbytes for p in parameters))
"""


@pytest.mark.slow
def test_the_peak_is_about_one_gradient():
    """Of four; in a process of its own, in which what is freed is gone."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=Path(__file__).parent.parent,
        env=os.environ | memory.MALLOC,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
