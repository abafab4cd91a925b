"""Surgery in two phases: what it refuses, and hooks."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpcgrad import methods
from fastpcgrad.merging.two_phase import merge_in_two_phases
from tests import graph_models
from tests.test_two_phase import flat, ordinary


def clipped(model, where):
    h = model.x
    for place, layer in enumerate(model.layers):
        h = layer(h).tanh()
        if place == where:
            h.register_hook(lambda g: g / g.norm())
    return graph_models.losses_of(h, 3)


class TestRefusals:
    """``.grad`` is as it was."""

    @pytest.fixture(autouse=True)
    def model(self):
        self.model = graph_models.MLP()
        self.parameters = list(self.model.parameters())
        self.parameters[0].grad = torch.ones_like(self.parameters[0])
        yield
        assert (self.parameters[0].grad == 1).all()
        assert all(p.grad is None for p in self.parameters[1:])

    def refuses(self, kind, *words, losses=None, parameters=None, method=None):
        with pytest.raises(kind, match=".*".join(map(re.escape, words))):
            merge_in_two_phases(losses or self.model(3), parameters or self.parameters, method or methods.Mean())

    def test_a_method_that_needs_rows(self):
        self.refuses(TypeError, "GradDrop", method=methods.GradDrop())

    def test_a_method_that_works_on_each_parameter(self):
        self.refuses(ValueError, "tensorlogic", method=methods.PCGrad("tensorlogic"))

    def test_parameters_that_are_no_leaves(self):
        self.refuses(ValueError, "parameters[0]", "MulBackward0", parameters=[self.parameters[0] * 2])

    def test_hooks_that_want_a_tasks_gradient(self):
        self.parameters[3].register_post_accumulate_grad_hook(lambda p: None)
        self.refuses(ValueError, "parameters[3]", "hook")

    def test_reentrant_checkpoints(self):
        h = checkpoint(self.model.layers[0], self.model.x.requires_grad_(), use_reentrant=True)
        self.refuses(RuntimeError, "reentrant", losses=[h.sum(), h.mean()])

    def test_a_graph_that_cannot_be_kept(self):
        class Donating(torch.autograd.Function):
            """Says what a compiled graph with donated buffers says where the graph is retained."""

            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                if torch._C._autograd._get_current_graph_task_keep_graph():
                    raise RuntimeError("This backward function was compiled with non-empty donated buffers which ...")
                return grad

        h = self.model.x
        for layer in self.model.layers:
            h = Donating.apply(layer(h))
        self.refuses(RuntimeError, "donated_buffer = False", losses=graph_models.losses_of(h, 2))

    def test_losses_that_are_none(self):
        self.refuses(ValueError, "losses[0]", losses=[torch.zeros(3, requires_grad=True)])

    @pytest.mark.parametrize("where", [0, 2, 5])
    def test_a_hook_on_an_activation_that_is_not_linear(self, where):
        self.refuses(RuntimeError, "linear", losses=clipped(self.model, where))

    def test_a_hook_on_a_parameter_that_is_not_linear(self):
        self.parameters[4].register_hook(lambda g: g / g.norm())
        self.refuses(RuntimeError, "linear")

    def test_a_custom_function_that_is_not_linear(self):
        class Sign(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad.sign()

        h = self.model.x
        for layer in self.model.layers:
            h = Sign.apply(layer(h).tanh())
        self.refuses(RuntimeError, "linear", losses=graph_models.losses_of(h, 3))

    def test_an_error_in_the_weighted_pass(self):
        calls = []

        def fails(grad):
            calls.append(1)
            if len(calls) > 3:  # the three tasks have been there
                raise ZeroDivisionError("in a hook")

        self.parameters[0].register_hook(fails)
        self.refuses(ZeroDivisionError, "in a hook")
        assert len(calls) == 4

    def test_a_graph_in_one_piece(self):
        class Whole(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                return sum(t.sum() for t in tensors)

            @staticmethod
            def backward(ctx, grad):
                return tuple(grad.expand_as(p) for p in parameters)

        parameters = self.parameters
        whole = Whole.apply(*parameters)
        self.refuses(ValueError, "252 of 252", "3", losses=[whole, whole * 2, -whole])


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("where", range(6))
def test_a_hook_on_an_activation_is_obeyed_or_found_out(where, inner):
    """One at a cut runs twice, and must not change what comes out, however little of it lies behind the cut."""
    model = graph_models.MLP()
    parameters = list(model.parameters())
    h = model.x
    for place, layer in enumerate(model.layers):
        a = layer(h)
        h = a.tanh()
        if place == where:
            (a if inner else h).register_hook(lambda g: g * 0.5)
    losses = graph_models.losses_of(h, 3)
    _, expected = ordinary(losses, parameters, methods.PCGrad("tensorflow"))
    try:
        _, found = merge_in_two_phases(losses, parameters, methods.PCGrad("tensorflow"))
    except RuntimeError as error:
        assert "linear" in str(error)
    else:
        torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-7)


def test_a_hook_on_a_parameter_that_is_linear_is_obeyed():
    model = graph_models.Tied().double()
    parameters = list(model.parameters())
    parameters[0].register_hook(lambda g: g * 0.5)
    losses = model(3)
    _, expected = ordinary(losses, parameters, methods.PCGrad("tensorflow"))
    _, found = merge_in_two_phases(losses, parameters, methods.PCGrad("tensorflow"))
    torch.testing.assert_close(flat(found), flat(expected))
