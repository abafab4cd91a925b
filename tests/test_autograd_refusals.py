"""What backward and grad refuse by name."""

import pytest
import torch

import fastpcgrad

BAD_LOSSES = [
    ([], ValueError, ["losses", "none"]),
    (torch.zeros(0, requires_grad=True), ValueError, ["losses", "none"]),
    (torch.zeros((), requires_grad=True), ValueError, ["losses", "[]"]),
    (torch.zeros(2, 2, requires_grad=True), ValueError, ["losses", "[2, 2]"]),
    ([torch.zeros(2, requires_grad=True)], ValueError, ["losses[0]", "[2]"]),
    ([torch.zeros(())], ValueError, ["losses[0]", "grad"]),
    ([1.0], TypeError, ["losses[0]", "float"]),
    ({"task": torch.zeros((), requires_grad=True)}, TypeError, ["losses[0]", "str"]),
    (None, TypeError, ["losses", "NoneType"]),
    ([torch.zeros((), dtype=torch.int64)], TypeError, ["losses[0]", "int64"]),
    ([torch.zeros((), dtype=torch.complex64, requires_grad=True)], TypeError, ["losses[0]", "complex64"]),
    (
        [torch.zeros((), device=device, requires_grad=True) for device in ("cpu", "meta")],
        ValueError,
        ["one device", "cpu", "meta"],
    ),
]


"""Losses, the exception, and words of its message; the drop-in refuses the same."""


@pytest.mark.parametrize("call", [fastpcgrad.grad, fastpcgrad.backward])
@pytest.mark.parametrize(("losses", "error", "words"), BAD_LOSSES)
def test_bad_losses_are_named_and_nothing_changes(call, losses, error, words):
    p = torch.zeros(2, requires_grad=True)
    p.grad = kept = torch.ones(2)
    with pytest.raises(error) as caught:
        call(losses, [p])
    assert all(word in str(caught.value) for word in words), caught.value
    assert p.grad is kept and kept.tolist() == [1, 1]


@pytest.mark.parametrize("call", [fastpcgrad.grad, fastpcgrad.backward])
@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ([], ValueError, ["inputs", "none"]),
        ([1.0], TypeError, ["inputs[0]", "float"]),
        ([torch.zeros(2)], ValueError, ["inputs[0]", "require"]),
        ([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], TypeError, ["complex64"]),
        (
            [torch.zeros(2, device=device, requires_grad=True) for device in ("cpu", "meta")],
            ValueError,
            ["no memory", "cpu", "meta"],
        ),
    ],
)
def test_bad_inputs_are_named(call, inputs, error, words):
    with pytest.raises(error) as caught:
        call([torch.zeros((), requires_grad=True)], inputs)
    assert all(word in str(caught.value) for word in words), caught.value


def test_backward_refuses_inputs_that_are_no_leaves():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"leaves.*\[2\]"):
        fastpcgrad.backward([x.sum()], [x * 2])


@pytest.mark.parametrize("call", [fastpcgrad.grad, fastpcgrad.backward])
def test_a_method_that_is_none_is_named(call):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"method.*paper"):
        call([x.sum()], [x], method="paper")


def test_losses_without_an_order_are_refused():
    x = torch.ones(2, requires_grad=True)
    losses = {x.sum(), x.square().sum()}
    surgery = fastpcgrad.GradientSurgery([x], 2)
    for call in (
        fastpcgrad.backward,
        surgery.backward,
        fastpcgrad.PCGrad(torch.optim.SGD([x], lr=0.1)).pc_backward,
        lambda given: surgery.backward({(lambda: x.sum()), (lambda: x.prod())}),
    ):
        with pytest.raises(TypeError, match=r"losses must be a sequence of .*; found set"):
            call(losses)
    assert x.grad is None


@pytest.mark.parametrize("call", ["grad", "backward", "gramian", "observe", "two_phase"])
def test_where_complex_parameters_are_taken_is_said(call):
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    q = torch.nn.Parameter(torch.ones(2))
    p.grad, q.grad = torch.ones(2, dtype=torch.complex64), torch.ones(2)
    losses = [p.abs().sum() + q.sum(), (p.real * q).sum()]
    calls = {
        "grad": lambda: fastpcgrad.grad(losses, [p, q]),
        "backward": lambda: fastpcgrad.backward(losses),
        "gramian": lambda: fastpcgrad.gramian(losses, [q, p]),
        "observe": lambda: fastpcgrad.ConflictMonitor([p, q], 2).observe(losses),
        "two_phase": lambda: fastpcgrad.GradientSurgery([p, q], 2).backward(losses, two_phase=True),
    }
    with pytest.raises(TypeError, match=r"found torch\.complex64: .* GradientSurgery and PCGrad alone"):
        calls[call]()
    assert torch.equal(p.grad, torch.ones(2, dtype=torch.complex64)) and torch.equal(q.grad, torch.ones(2))
    fastpcgrad.GradientSurgery([p, q], 2).backward(losses)
