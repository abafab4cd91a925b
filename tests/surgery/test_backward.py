"""surgery.backward: a whole round at once, from functions that run forwards of their own or from losses of a graph."""

import weakref

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods, reference

FIXED = "tensorflow"
TASKS = 3


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, TASKS))


@pytest.fixture
def x():
    return torch.randn(16, 4)


@pytest.fixture(params=[{}, {"row_dtype": torch.float64}], ids=["as they are", "converted"])
def surgery(request, model):
    return fastpcgrad.GradientSurgery(model.parameters(), TASKS, methods.PCGrad(FIXED), **request.param)


def loss_of(model, x, task):
    return (model(x)[:, task] - task).square().mean()


def forwards(model, x):
    return [lambda t=t: loss_of(model, x, t) for t in range(TASKS)]


def shared_graph(model, x):
    return list((model(x) - torch.arange(TASKS)).square().mean(dim=0).unbind())


def expected(model, x, *tasks):
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss_of(model, x, t), parameters) for t in tasks]
    return reference.merge([list(map(torch.Tensor.double, row)) for row in rows], parameters, FIXED)


def assert_merged(model, wanted):
    for p, e in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, e.float(), rtol=1e-5, atol=1e-7)


def grads(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("losses", [forwards, shared_graph])
def test_a_round_of_all_tasks(model, x, surgery, losses):
    for _ in range(2):
        report = surgery.backward(losses(model, x))
        assert report.tasks == (0, 1, 2)
        assert_merged(model, expected(model, x, 0, 1, 2))


def test_one_tensor_of_losses_will_do(model, x, surgery):
    surgery.backward((model(x) - torch.arange(TASKS)).square().mean(dim=0))
    assert_merged(model, expected(model, x, 0, 1, 2))


@pytest.mark.parametrize("losses", [forwards, shared_graph])
@pytest.mark.parametrize("absent", [(0,), (2,), (0, 2)], ids=str)
def test_none_stands_for_a_task_that_is_absent(model, x, surgery, losses, absent):
    present = tuple(t for t in range(TASKS) if t not in absent)
    given = [None if t in absent else loss for t, loss in enumerate(losses(model, x))]
    assert surgery.backward(given).tasks == present
    assert_merged(model, expected(model, x, *present))


def test_a_function_may_find_that_its_task_is_absent(model, x, surgery):
    given = forwards(model, x)
    given[1] = lambda: None
    assert surgery.backward(given).tasks == (0, 2)
    assert_merged(model, expected(model, x, 0, 2))


def test_a_function_may_run_further_micro_batches_backward_itself(model, x, surgery):
    def accumulated(task):
        (0.25 * loss_of(model, x, task)).backward()
        return 0.75 * loss_of(model, x, task)

    surgery.backward([lambda t=t: accumulated(t) for t in range(TASKS)])
    assert_merged(model, expected(model, x, 0, 1, 2))


def test_a_module_is_a_function_too():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.weight.sum()

    loss = Loss()
    assert fastpcgrad.GradientSurgery(loss.parameters(), 2).backward([loss, loss]).gram.tolist() == [[3, 3]] * 2


def test_each_graph_is_freed_before_the_next_forward(model, x, surgery):
    graphs = []

    def forward(task):
        assert not any(graph() is not None for graph in graphs)
        hidden = model(x)
        graphs.append(weakref.ref(hidden))
        return hidden[:, task].square().mean()

    surgery.backward([lambda t=t: forward(t) for t in range(TASKS)])
    assert len(graphs) == TASKS and not any(graph() is not None for graph in graphs)


@pytest.mark.parametrize("losses", [forwards, shared_graph])
def test_a_retained_graph_takes_a_second_pass_and_others_are_freed(model, x, surgery, losses):
    for retain in (True, False):
        given = losses(model, x)
        kept = [] if losses is forwards else given
        if losses is forwards:
            given = [lambda f=f, kept=kept: kept.append(f()) or kept[-1] for f in given]
        surgery.backward(given, retain_graph=retain)
        if retain:
            kept[-1].backward()
        else:
            with pytest.raises(RuntimeError, match="second time"):
                kept[-1].backward()


def failing_forward():
    raise ZeroDivisionError


def failing_backward(model, x, task):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    return model[2](Fails.apply(model[:2](x)))[:, task].sum()


@pytest.mark.parametrize("failing", range(TASKS))
@pytest.mark.parametrize("where", ["forward", "backward", "shared graph"])
@pytest.mark.parametrize("before", ["nothing", "the user's"])
def test_an_exception_in_a_round_discards_it_and_keeps_grad(model, x, surgery, failing, where, before):
    if before != "nothing":
        loss_of(model, x, 0).backward()
    kept, values = grads(model), [None if g is None else g.clone() for g in grads(model)]
    given = shared_graph(model, x) if where == "shared graph" else forwards(model, x)
    given[failing] = {
        "forward": failing_forward,
        "backward": lambda: failing_backward(model, x, failing),
        "shared graph": failing_backward(model, x, failing),
    }[where]
    with pytest.raises(ZeroDivisionError):
        surgery.backward(given)
    for grad, there, value in zip(grads(model), kept, values, strict=True):
        assert grad is there and (grad is None or torch.equal(grad, value))
    with pytest.raises(RuntimeError, match="no task"):
        surgery.merge()
    surgery.backward(forwards(model, x))
    assert_merged(model, expected(model, x, 0, 1, 2))


def test_a_method_that_fails_ends_the_round_too(model, x, surgery):
    surgery.method = type("Broken", (methods.Method,), {"solve": lambda self, gram: 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        surgery.backward(forwards(model, x))
    assert grads(model) == [None] * 4
    with pytest.raises(RuntimeError, match="no task"):
        surgery.merge()


def test_the_last_merged_gradient_ends_as_a_round_begins_even_if_that_fails(model, x, surgery):
    surgery.backward(forwards(model, x))
    with pytest.raises(ZeroDivisionError):
        surgery.backward([failing_forward] * TASKS)
    assert grads(model) == [None] * 4


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        (lambda f, s: f[:2], ValueError, ["3 tasks", "found 2"]),
        (lambda f, s: [], ValueError, ["3 tasks", "found 0"]),
        (lambda f, s: [None] * 3, ValueError, ["absent", "3 times None"]),
        (lambda f, s: 3, TypeError, ["int"]),
        (lambda f, s: [f[0], s[1], f[2]], TypeError, ["all functions or all tensors"]),
        (lambda f, s: [f[0], 2.0, None], TypeError, ["losses[1]", "float"]),
        (lambda f, s: [None, 2.0, s[2]], TypeError, ["losses[1]", "float"]),
        (lambda f, s: [None, s[1], s[2].detach()], ValueError, ["losses[2]", "no grad"]),
        (lambda f, s: [None, s[1], s[2] * torch.ones(2)], ValueError, ["losses[2]", "[2]"]),
        (lambda f, s: torch.stack(s)[:2], ValueError, ["3 tasks", "found 2"]),
        (lambda f, s: torch.stack(s)[None], ValueError, ["[1, 3]"]),
        (lambda f, s: [s[0], s[1], torch.zeros((), device="meta", requires_grad=True)], ValueError, ["one device"]),
    ],
)
def test_bad_losses_are_named_before_anything_changes(model, x, surgery, losses, error, words):
    surgery.backward(forwards(model, x))
    before = grads(model)
    with pytest.raises(error) as caught:
        surgery.backward(losses(forwards(model, x), shared_graph(model, x)))
    assert all(word in str(caught.value) for word in words), caught.value
    assert all(a is b for a, b in zip(grads(model), before, strict=True))


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda: 1.0, TypeError, ["losses[1]()", "float"]),
        (lambda: torch.ones(()), ValueError, ["losses[1]()", "no grad"]),
        (lambda: torch.ones(2, requires_grad=True) * 2, ValueError, ["losses[1]()", "[2]"]),
    ],
)
def test_what_a_function_returns_is_checked_when_it_has_run(model, x, surgery, loss, error, words):
    first, _, last = forwards(model, x)
    with pytest.raises(error) as caught:
        surgery.backward([first, loss, last])
    assert all(word in str(caught.value) for word in words), caught.value
    assert grads(model) == [None] * 4


def test_a_function_that_ran_backward_but_says_that_its_task_is_absent_is_refused(model, x, surgery):
    first, _, last = forwards(model, x)
    with pytest.raises(RuntimeError, match=r"losses\[1\]\(\) returned None.*left gradients"):
        surgery.backward([first, lambda: loss_of(model, x, 1).backward(), last])
    assert grads(model) == [None] * 4


def test_rows_of_a_round_that_was_begun_are_refused_and_kept(model, x, surgery):
    with surgery.task(1):
        loss_of(model, x, 1).backward()
    with pytest.raises(RuntimeError, match=r"tasks \[1\].*merge\(\) or discard\(\)"):
        surgery.backward(forwards(model, x))
    surgery.merge()
    assert_merged(model, expected(model, x, 1))


def test_a_round_within_a_task_is_refused(model, x, surgery):
    with surgery.task(1):
        with pytest.raises(RuntimeError, match=r"backward\(\) inside task\(1\)"):
            surgery.backward(forwards(model, x))
        loss_of(model, x, 1).backward()
    surgery.merge()
    assert_merged(model, expected(model, x, 1))


def test_a_task_within_a_round_is_refused(model, x, surgery):
    def nested():
        with surgery.task(1):
            raise AssertionError("the task was entered")

    with pytest.raises(RuntimeError, match=r"task\(1\) inside task\(0\)"):
        surgery.backward([nested, None, None])
