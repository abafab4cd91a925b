"""gradNorm against oracles that differentiate twice, written from the paper and from the original's description."""

import numpy as np
import pytest
import torch
from torch import nn

from fastpcgrad.gradnorm import gradNorm

from .toy import STEPS, VARIANTS, ToyNet, for_each_variant, toy


def oracle(net, layer, alpha, batches, lr1, lr2, leak):
    """GradNorm with the derivative of Σ|n_i − target_i| taken by autograd; ``leak`` adds its part for the network."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr1)
    weight = next(layer.parameters())
    w, initial, log_weights, log_losses = None, None, [], []
    for batch in batches:
        losses = net(*batch)
        if w is None:
            w, initial = torch.ones_like(losses), losses.detach()
        w = w.detach().requires_grad_()
        optimizer.zero_grad()
        (w.detach() @ losses).backward(retain_graph=True)
        norms = torch.stack(
            [torch.autograd.grad(w[i] * losses[i], weight, create_graph=True)[0].norm() for i in range(len(losses))]
        )
        ratios = losses.detach() / initial
        targets = (norms.mean() * (ratios / ratios.mean()) ** alpha).detach()
        gradnorm_loss = (norms - targets).abs().sum()
        if leak:
            gradnorm_loss.backward()
        else:
            w.grad = torch.autograd.grad(gradnorm_loss, w)[0]
        log_weights.append(w.detach().clone())
        log_losses.append(ratios)
        optimizer.step()
        torch.optim.Adam([w], lr=lr2).step()
        w = w.detach() / w.detach().sum() * len(losses)
    return torch.stack(log_weights).numpy(), torch.stack(log_losses).numpy()


@for_each_variant
@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize(("lr1", "lr2"), [(1e-5, 1e-4), (1e-3, 1e-3)])
def test_trajectories_are_those_of_the_double_backward(variant, tasks, lr1, lr2):
    batches = 20
    net, data = toy(tasks, batches)
    expected = oracle(net, net.last, 0.12, data * (STEPS // batches), lr1, lr2, leak=variant == "lucasbotang")
    net, data = toy(tasks, batches)
    found = gradNorm(net, net.last, 0.12, data, STEPS // batches, lr1, lr2, log=True, variant=variant)
    for logged, by_oracle in zip(found, expected, strict=True):
        assert logged.shape == (STEPS, tasks) and logged.dtype == np.float64
        # Training amplifies the rounding of float64; the leak alone moves the losses by more than 1e-4.
        np.testing.assert_allclose(logged, by_oracle, rtol=1e-8)
    assert np.abs(found[0][-1] - 1).max() > 50 * lr2, "the weights have to have moved for this to mean something"


def test_the_default_is_the_paper_and_the_leak_is_no_rounding():
    runs = {}
    for variant in ({}, *({"variant": name} for name in VARIANTS)):
        net, data = toy(3, 60)
        runs[variant.get("variant")] = gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-3, log=True, **variant)[1]
    np.testing.assert_array_equal(runs[None], runs["paper"])
    assert np.abs(runs["paper"] / runs["lucasbotang"] - 1).max() > 1e-3


@for_each_variant
def test_fp32_follows_the_oracle(variant):
    """Ten steps, before training amplifies the rounding of fp32; a weight step is 1e-3, so 1e-5 tells it apart."""
    net, data = toy(3, 10, torch.float32)
    expected = oracle(net, net.last, 0.12, data, 1e-4, 1e-3, leak=variant == "lucasbotang")
    net, data = toy(3, 10, torch.float32)
    found = gradNorm(net, net.last, 0.12, data, 1, 1e-4, 1e-3, log=True, variant=variant)
    for logged, by_oracle in zip(found, expected, strict=True):
        assert logged.dtype == np.float32
        np.testing.assert_allclose(logged, by_oracle, rtol=1e-5)


class TwoScalars(nn.Module):
    """L_1 = ½ (a − 1)², L_2 = ½ (3 a)²: their derivatives by a are a − 1 and 9 a."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a], dtype=torch.float64))

    def forward(self, x):
        return torch.cat([(self.a - x).square() / 2, (3 * self.a).square() / 2])


def test_a_step_worked_by_hand():
    """At a = 2 the norms are 1 and 18: both away from their mean 9.5, so w moves by ±lr2 and sums to 2 already."""
    net = TwoScalars(2.0)
    log_weights, log_loss = gradNorm(net, net, 1.0, [(1.0,), (1.0,)], 1, 0.5, 0.25, log=True)
    np.testing.assert_allclose(log_weights, [[1.0, 1.0], [1.25, 0.75]], rtol=1e-7)
    # Adam's first step is lr1, down: a = 1.5.
    np.testing.assert_allclose(log_loss, [[1.0, 1.0], [0.25, 0.5625]], rtol=1e-7)


@for_each_variant
def test_the_weights_sum_to_the_number_of_tasks(variant):
    net, data = toy(4, 30)
    log_weights, _ = gradNorm(net, net.last, 1.5, data, 1, 1e-3, 0.1, log=True, variant=variant)
    np.testing.assert_allclose(log_weights.sum(axis=1), 4, rtol=1e-14)


def test_a_learning_rate_of_zero_keeps_equal_weights_and_trains_with_the_sum():
    net, data = toy(3, 20)
    log_weights, log_loss = gradNorm(net, net.last, 0.12, data, 1, 1e-3, 0.0, log=True)
    np.testing.assert_allclose(log_weights, 1, rtol=1e-14)
    plain, _ = toy(3, 20)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    initial = plain(*data[0]).detach()
    for batch, ratios in zip(data, log_loss, strict=True):
        losses = plain(*batch)
        np.testing.assert_allclose(ratios, (losses / initial).detach().numpy(), rtol=1e-10)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()


def test_without_log_the_arrays_have_no_rows_and_the_network_is_trained_alike():
    """As the original's sample calls it, by keyword and with two names for what comes back."""
    logging, data = toy(3, 5)
    gradNorm(logging, logging.last, 0.12, data, 2, 1e-3, 1e-3, True)
    net, data = toy(3, 5)
    log_weights, log_loss = gradNorm(
        net=net, layer=net.last, alpha=0.12, dataloader=data, num_epochs=2, lr1=1e-3, lr2=1e-3, log=False
    )
    assert log_weights.shape == log_loss.shape == (0, 3)
    assert log_weights.dtype == np.float64
    for parameter, other in zip(net.parameters(), logging.parameters(), strict=True):
        assert torch.equal(parameter, other)


class Column(ToyNet):
    """Its losses are one column ``[T, 1]``, stacked from losses ``[1]``."""

    def forward(self, x, y):
        return torch.stack([loss[None] for loss in super().forward(x, y).unbind()])


class LateColumn(ToyNet):
    """Stacked along the other dimension: from one tensor of all tasks."""

    def forward(self, x, y):
        return torch.stack([super().forward(x, y)], dim=1)


@for_each_variant
@pytest.mark.parametrize("kind", [Column, LateColumn])
def test_losses_in_a_column_train_as_those_in_a_row(variant, kind):
    net, data = toy(3, 5)
    other = kind(3).double()
    other.load_state_dict(net.state_dict())
    found = [gradNorm(n, n.last, 0.5, data, 2, 1e-3, 1e-2, True, variant=variant) for n in (net, other)]
    for row, column in zip(*found, strict=True):
        assert row.shape == column.shape == (10, 3)
        np.testing.assert_allclose(column, row, rtol=1e-12)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_each_task_runs_through_its_own_head_alone():
    """Also where the losses were stacked, and with another task's loss at infinity."""
    passes = [0] * 3
    net, data = toy(3, 1)
    for t, head in enumerate(net.heads):
        head.register_full_backward_hook(lambda *_, t=t: passes.__setitem__(t, passes[t] + 1))
    gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-3)
    assert passes == [2, 2, 2], "one for the norm and one for the weighted sum"


@for_each_variant
def test_only_the_first_parameter_of_a_module_counts(variant):
    runs = []
    for layer in (lambda net: net.last, lambda net: net.last.weight, lambda net: [net.last.weight]):
        net, data = toy(2, 10)
        runs.append(gradNorm(net, layer(net), 0.12, data, 1, 1e-3, 1e-2, log=True, variant=variant)[0])
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_it_trains_in_training_mode_and_takes_any_batch_arguments():
    class Tagged(ToyNet):
        def forward(self, x, y, tag):
            assert self.training and tag == "north"
            return super().forward(x, y)

    _, data = toy(2, 3)
    net = Tagged(2).double().eval()
    log_weights, _ = gradNorm(net, net.last, 0.12, [[*batch, "north"] for batch in data], 1, 1e-3, 1e-3, log=True)
    assert log_weights.shape == (3, 2)
