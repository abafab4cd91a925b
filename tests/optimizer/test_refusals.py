"""What PCGrad(optimizer) refuses, and what failures leave."""

import random

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods
from tests.test_autograd_refusals import BAD_LOSSES

from .models import assert_merged, fixed, losses_of, train


def everything(optimizer):
    """All state that a refused call must not touch."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in parameters],
        "parameters": [p.tolist() for p in parameters],
        "optimizer": repr(optimizer.state_dict()),
        "generators": (random.getstate(), torch.get_rng_state().tolist()),
        "report": id(optimizer.report),
        "rows": optimizer._surgery._layouts.current.capture.rows.tasks,
    }


@pytest.mark.parametrize(("losses", "error", "words"), BAD_LOSSES)
def test_bad_losses_are_named_and_nothing_changes(model, x, losses, error, words):
    optimizer = fastpcgrad.PCGrad(torch.optim.Adam(model.parameters()))
    train(model, optimizer, x, steps=2)
    before = everything(optimizer)
    with pytest.raises(error) as caught:
        optimizer.pc_backward(losses)
    assert all(word in str(caught.value) for word in words), caught.value
    assert everything(optimizer) == before


def test_parameters_that_cannot_be_packed_are_refused_before_anything_changes(model, x):
    """A parameter of a dtype that rows cannot have, added later."""
    optimizer = fastpcgrad.PCGrad(torch.optim.Adam(model.parameters()))
    train(model, optimizer, x, steps=2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn))]})
    before = everything(optimizer)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        optimizer.pc_backward(losses_of(model, x))
    assert everything(optimizer) == before


def test_a_failing_backward_leaves_no_half_merged_gradient_and_the_next_surgery_is_right(model, x):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    first, second, third = losses_of(model, x)
    mine = [torch.full_like(p, 5.0) for p in model.parameters()]
    for p, grad in zip(model.parameters(), mine, strict=True):
        p.grad = grad
    with pytest.raises(ZeroDivisionError):
        optimizer.pc_backward([first, Fails.apply(second), third])
    assert all(p.grad is grad and (grad == 5).all() for p, grad in zip(model.parameters(), mine, strict=True))
    optimizer.pc_backward(losses_of(model, x))
    assert_merged(list(model.parameters()), losses_of(model, x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": [torch.zeros(1, requires_grad=True)]}, TypeError, ["optimizer", "list"]),
        ({"reduction": "average"}, ValueError, ["reduction", "average", "mean"]),
        ({"variant": "pcgrad"}, ValueError, ["variant", "pcgrad", "libmtl"]),
        ({"method": "paper"}, TypeError, ["method", "paper"]),
        ({"method": methods.PCGrad(), "variant": "paper"}, ValueError, ["method", "variant='paper'"]),
        ({"method": methods.PCGrad(), "reduction": "sum"}, ValueError, ["method", "reduction='sum'"]),
        ({"generator": 7}, TypeError, ["generator", "7"]),
        ({"shared": torch.zeros(1)}, TypeError, ["shared", "single tensor"]),
        ({"shared": [torch.zeros(3, requires_grad=True)]}, ValueError, ["shared", "[3]"]),
        ({"row_dtype": torch.int32}, TypeError, ["int32"]),
        ({"process_group": object()}, TypeError, ["process_group", "object"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_bad_choices_name_what_was_found(options, error, words):
    options = {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), **options}
    with pytest.raises(error) as caught:
        fastpcgrad.PCGrad(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_optimizer_without_trainable_parameters_does_nothing():
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([frozen], lr=0.1))
    other = torch.ones(2, requires_grad=True)
    optimizer.pc_backward([other.sum(), other.square().sum()])
    optimizer.step()
    assert frozen.grad is None and frozen.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rows", ["auto", "dense", "factored"])
@pytest.mark.parametrize("method", [methods.PCGrad, methods.UPGrad])
@pytest.mark.parametrize("within", ["pc_backward", "discard"])
def test_a_round_within_a_backward_pass_of_another_is_an_error(rows, method, within):
    """First in the first round of an optimizer, then in one like those before; the next one is as if nothing was."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x = torch.randn(3, 5, dtype=torch.float64)

    def outputs(hook=None):
        out = model(x)
        if hook is not None:
            out.register_hook(hook)
        return [out[:, 0].square().mean(), (out[:, 1] - 1).square().mean()]

    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), rows=rows, method=method())
    for _ in range(3):
        done = []

        def hook(grad, done=done):
            if not done:
                done.append(True)
                with torch.enable_grad():
                    optimizer._surgery.discard() if within == "discard" else optimizer.pc_backward(outputs())

        with pytest.raises(RuntimeError, match="another round began, or discard"):
            optimizer.pc_backward(outputs(hook))
        assert done
        optimizer.zero_grad()
        other = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), rows=rows, method=method())
        optimizer.pc_backward(outputs())
        expected = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        other.pc_backward(outputs())
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-14)
        optimizer.step()
        optimizer.zero_grad()
