"""Steps under FakeTensorMode, as memory estimators run them: shapes come out, and later real steps are right."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastpcgrad
from fastpcgrad import balancing, methods, reference, variants
from tests.methods.test_in_surgery import all_methods

TASKS = 3


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, TASKS))


def losses_of(model):
    x = torch.linspace(-1, 1, 24).view(6, 4)
    return [(output - t).square().mean() for t, output in enumerate(model(x).unbind(1))]


def drop_in(model, method):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), method=method)
    optimizer.pc_backward(losses_of(model))
    optimizer.step()


def task_by_task(model, method, **options):
    surgery = fastpcgrad.GradientSurgery(model.parameters(), TASKS, method, **options)
    for t in (*range(TASKS), 0):
        with surgery.task(t):
            losses_of(model)[t].backward()
    return surgery.merge()


def like_autograd(model, method):
    fastpcgrad.backward(losses_of(model), method=method)


def at_features(model, method):
    features = fastpcgrad.shared_features(model[:2](torch.ones(6, 4)), TASKS, method)
    sum(model[2](z).square().mean() * (t - 1) for t, z in enumerate(features)).backward()


WAYS = {
    "drop-in": drop_in,
    "task by task": task_by_task,
    "converted": lambda model, method: task_by_task(model, method, row_dtype=torch.bfloat16),
    "by parameter": lambda model, method: task_by_task(model, method, granularity="parameter"),
    "means": lambda model, method: task_by_task(model, method, accumulate="mean"),
    "backward": like_autograd,
    "features": at_features,
}


def assert_shapes(model):
    for p in model.parameters():
        assert isinstance(p.grad, FakeTensor)
        assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype)


def assert_a_real_step_is_right(way):
    model = make_model()
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses_of(model)]
    expected = reference.merge(rows, list(model.parameters()), "tensorflow")
    task_by_task(model, methods.PCGrad("tensorflow"))
    if way == "drop-in":
        model.zero_grad()
        fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", variant="tensorflow").pc_backward(
            losses_of(model)
        )
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), check_dtype=False)
    assert all(p.grad.isfinite().all() and type(p.grad) is torch.Tensor for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_every_way_gives_gradients_of_the_right_shape_and_leaves_nothing_behind(way, variant):
    if way == "by parameter" and variant == "libmtl":
        pytest.skip("has a scope of its own")
    with FakeTensorMode():
        model = make_model()
        WAYS[way](model, methods.PCGrad(variant))
        if variant != "tensorlogic":
            assert_shapes(model)
    assert_a_real_step_is_right(way)


@pytest.mark.parametrize("make_method", list(all_methods()))
def test_every_method_runs_or_says_that_it_needs_numbers(make_method):
    with FakeTensorMode():
        model = make_model()
        try:
            drop_in(model, make_method())
        except (RuntimeError, TypeError, ValueError) as error:
            assert "FakeTensorMode" in str(error) or "numbers" in str(error), error
        else:
            assert_shapes(model)
    assert_a_real_step_is_right("drop-in")


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_orders_that_were_drawn_there_serve_no_real_call(tasks):
    with FakeTensorMode():
        for _ in range(40):
            assert fastpcgrad.pcgrad(torch.empty(tasks, 7), variant="pytorch-pcgrad").shape == (7,)
    J = torch.randn(tasks, 7, dtype=torch.float64)
    rows = [[row] for row in J]
    for seed in range(10):
        found = fastpcgrad.pcgrad(J, variant="pytorch-pcgrad", generator=random.Random(seed))
        expected = reference.merge(rows, [J[0]], "pytorch-pcgrad", random.Random(seed))[0]
        torch.testing.assert_close(found, expected)


def test_tensors_of_the_meta_device_give_such():
    J = torch.empty(3, 7, device="meta", dtype=torch.bfloat16)
    G = fastpcgrad.gram(J)
    assert (G.shape, G.dtype, G.device.type) == ((3, 3), torch.float64, "meta")
    merged = fastpcgrad.combine(J, torch.empty(3, device="meta", dtype=torch.float64))
    assert (merged.shape, merged.dtype, merged.device.type) == ((7,), torch.bfloat16, "meta")


@pytest.mark.parametrize("make_method", list(all_methods()))
def test_methods_take_a_gram_matrix_of_the_meta_device(make_method):
    method, G = make_method(), torch.empty(2, TASKS, TASKS, device="meta", dtype=torch.float64)
    if method.needs_rows:
        pytest.skip("needs the task gradients themselves")
    weights = method.weights(G)
    assert (weights.shape, weights.dtype, weights.device.type) == ((2, TASKS), torch.float64, "meta")


@pytest.mark.parametrize("way", WAYS)
def test_a_model_on_the_meta_device_gets_gradients(way):
    with torch.device("meta"):
        model = make_model()
        WAYS[way](model, methods.PCGrad("tensorflow"))
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
    assert_a_real_step_is_right(way)


BALANCERS = {
    "GradNorm": lambda: balancing.GradNorm(TASKS, alpha=0.5),
    "FAMO": lambda: balancing.FAMO(TASKS),
    "DWA": lambda: balancing.DWA(TASKS),
    "Logarithm": lambda: balancing.Logarithm(TASKS),
    "STCH": lambda: balancing.STCH(TASKS, mu=1.0),
    "UncertaintyWeighting": lambda: balancing.UncertaintyWeighting(TASKS),
    "COSMOS": lambda: balancing.COSMOS(TASKS),
    "GeometricMean": lambda: balancing.GeometricMean(TASKS),
    "IMTLL": lambda: balancing.IMTLL(TASKS),
    "PBI": lambda: balancing.PBI(TASKS),
}


@pytest.mark.parametrize("name", BALANCERS)
def test_balancers_run(name):
    with FakeTensorMode():
        model, balancer = make_model(), BALANCERS[name]()
        losses = losses_of(model)
        if name == "GradNorm":
            balancer.note_gradients(losses, model[2])
        weighted = balancer(losses)
        assert len(weighted) == TASKS and all(isinstance(loss, FakeTensor) for loss in weighted)
        sum(weighted).backward()
        assert_shapes(model)
