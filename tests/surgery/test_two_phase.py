"""surgery.backward(..., two_phase=True): the same gradients as with rows, and what it refuses."""

import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods

TASKS = 3


def network():
    torch.manual_seed(5)
    trunk = [layer for _ in range(4) for layer in (torch.nn.Linear(8, 8, dtype=torch.float64), torch.nn.Tanh())]
    return torch.nn.ModuleList([torch.nn.Sequential(*trunk), torch.nn.Linear(8, TASKS, dtype=torch.float64)])


def losses(net):
    features = net[0](torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    return [(column - t).square().mean() for t, column in enumerate(net[1](features).unbind(dim=1))]


def surgery_on(net, **options):
    return fastpcgrad.GradientSurgery(
        net.parameters(), TASKS, methods.PCGrad("pytorch-pcgrad", generator=random.Random(2)), **options
    )


@pytest.mark.parametrize("absent", [(), (1,)])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_surgery_on_rows(absent, shared):
    found = []
    for two_phase in (False, True):
        net = network()
        surgery = surgery_on(net, shared=net[0].parameters() if shared else None)
        given = [None if t in absent else loss for t, loss in enumerate(losses(net))]
        for _ in range(2):  # .grad is replaced, not added to
            report = surgery.backward(given, retain_graph=True, two_phase=two_phase)
        found.append((report, [p.grad for p in net.parameters()]))
    (one, expected), (two, grads) = found
    torch.testing.assert_close(grads, expected)
    assert two.tasks == one.tasks
    for name in ("gram", "weights", "coefficients", "cosines"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": "parameter"}, ValueError, "granularity='parameter'"),
        ({"row_dtype": torch.bfloat16}, ValueError, "row_dtype.*torch.bfloat16"),
    ],
)
def test_refuses_what_needs_rows(options, error, message):
    net = network()
    surgery = surgery_on(net, **options)
    with pytest.raises(error, match=message):
        surgery.backward(losses(net), two_phase=True)
    assert all(p.grad is None for p in net.parameters())


def test_refuses_functions():
    net = network()
    with pytest.raises(TypeError, match=r"found functions for tasks \[0, 2\]"):
        surgery_on(net).backward([lambda: losses(net)[0], None, lambda: losses(net)[2]], two_phase=True)


def test_an_error_leaves_the_gradients():
    net = network()
    net[0][0].weight.grad = before = torch.ones(8, 8, dtype=torch.float64)
    net[1].weight.register_hook(lambda grad: grad / grad.norm())
    with pytest.raises(RuntimeError, match="not linear"):
        surgery_on(net).backward(losses(net), two_phase=True)
    assert net[0][0].weight.grad is before
    assert all(p.grad is None for p in net.parameters() if p is not net[0][0].weight)


def test_the_plan_is_less_than_that_of_rows():
    surgery = surgery_on(network())
    rows, two = surgery.memory_plan().device, surgery.memory_plan(two_phase=True).device
    assert rows.rows == TASKS * two.rows and rows.total > two.total
