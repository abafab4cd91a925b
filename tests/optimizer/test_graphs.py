"""PCGrad(optimizer): what a task's graph may hold, and several wrappers on one model."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods

from .models import Model, assert_merged, fixed, losses_of


def test_large_parameters_give_the_numbers_of_small_ones(x):
    """So large that the work is spread over threads."""
    model = Model(width=1 << 16)
    parameters = list(model.parameters())
    optimizer = fixed(torch.optim.SGD(parameters, lr=1e-5))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward(losses_of(model, x))
        assert_merged(parameters, losses_of(model, x))
        optimizer.step()


def test_tied_parameters_have_the_sum_of_their_uses(x):
    tied = nn.Linear(4, 4)
    optimizer = fixed(torch.optim.SGD(tied.parameters(), lr=0.1))

    def losses():
        output = tied(tied(x)) + x @ tied.weight
        return [output[:, 0].sum(), -output.sum()]

    optimizer.pc_backward(losses())
    assert_merged(list(tied.parameters()), losses())


def test_gradients_with_a_graph_of_their_own(model, x):
    """A gradient penalty: create_graph=True inside the forward of each task."""
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))

    def losses():
        inputs = x.clone().requires_grad_()
        plain = losses_of(model, inputs)
        return [loss + torch.autograd.grad(loss, inputs, create_graph=True)[0].square().sum() for loss in plain]

    optimizer.pc_backward(losses())
    assert not any(p.grad.requires_grad for p in model.parameters())
    parameters = list(model.parameters())
    assert_merged(parameters, losses())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # the cycle that it warns of is broken at once
def test_backward_with_create_graph_inside_a_task(model, x):
    rounds = fastpcgrad.GradientSurgery(model.parameters(), 3, methods.PCGrad("tensorflow"))
    parameters = list(model.parameters())
    for t, loss in enumerate(losses_of(model, x)):
        with rounds.task(t):
            loss.backward(create_graph=True)
    rounds.merge()
    assert not any(p.grad.requires_grad for p in parameters)
    assert_merged(parameters, losses_of(model, x))


def test_parameters_whose_gradients_autograd_makes_views_of_one_tensor():
    a, b = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    optimizer = fixed(torch.optim.SGD([a, b], lr=0.1))
    weights = torch.randn(2, 6)

    def losses():
        both = a.view(-1) + b.view(-1)
        return [(both * w).sum() for w in weights]

    optimizer.pc_backward(losses())
    assert a.grad.data_ptr() != b.grad.data_ptr()
    assert_merged([a, b], losses())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_models(model, x, use_reentrant):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    inputs = x.clone().requires_grad_()

    def trunk(z):
        return checkpoint(model.trunk, z, use_reentrant=use_reentrant)

    optimizer.pc_backward(losses_of(model, inputs, trunk))
    parameters = list(model.parameters())
    assert_merged(parameters, losses_of(model, x))


def test_a_compiled_model_with_a_forward_for_each_task(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward([losses_of(compiled, x)[t] for t in range(3)])
        parameters = list(model.parameters())
        assert_merged(parameters, losses_of(model, x))
        optimizer.step()


def test_pc_backward_works_where_grad_mode_is_off(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = losses_of(model, x)
    with torch.no_grad():
        optimizer.pc_backward(losses)
    assert_merged(list(model.parameters()), losses_of(model, x))


@pytest.mark.parametrize("row_dtype", [None, torch.float64])
def test_two_wrappers_on_one_model_do_not_disturb_each_other(x, row_dtype):
    model = Model()
    parameters = list(model.parameters())
    inner = torch.optim.SGD(parameters, lr=0.1)
    first, second = fixed(inner, row_dtype=row_dtype), fixed(inner, row_dtype=row_dtype)
    for optimizer, count in ((first, 3), (second, 2), (first, 2), (first, 3), (second, 3)):
        inner.zero_grad()
        optimizer.pc_backward(losses_of(model, x)[:count])
        assert_merged(parameters, losses_of(model, x)[:count])


def test_a_wrapper_that_is_gone_leaves_no_rows(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1), row_dtype=torch.float64)
    optimizer.pc_backward(losses_of(model, x))
    largest = max(model.parameters(), key=torch.numel)
    surgery = optimizer._surgery
    gone = [weakref.ref(held) for held in (optimizer, surgery, surgery._layouts.current.capture.rows)]
    kept = largest.grad.clone()
    del optimizer, surgery
    gc.collect()
    assert [reference_() for reference_ in gone] == [None] * 3
    assert torch.equal(largest.grad, kept)
    losses_of(model, x)[0].backward()
