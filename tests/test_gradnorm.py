"""gradNorm against oracles that differentiate twice, written from the paper and from the original's description."""

import numpy as np
import pytest
import torch
from torch import nn

from fastpcgrad.gradnorm import gradNorm

VARIANTS = ("paper", "lucasbotang")
STEPS = 200

for_each_variant = pytest.mark.parametrize("variant", VARIANTS)


class ToyNet(nn.Module):
    """The toy problem's network, small: a ReLU trunk and one linear head a task."""

    def __init__(self, tasks, width=12, features=10, labels=5):
        super().__init__()
        self.first = nn.Linear(features, width)
        self.last = nn.Linear(width, width)
        self.heads = nn.ModuleList(nn.Linear(width, labels) for _ in range(tasks))

    def forward(self, x, y):
        shared = self.last(self.first(x).relu()).relu()
        return torch.stack([nn.functional.mse_loss(head(shared), y[:, t]) for t, head in enumerate(self.heads)])


def toy(tasks, batches, dtype=torch.float64, samples=16, features=10, labels=5):
    """Targets σ_i tanh(x (B + ε_i)) with σ from 1 to 100, and a network to be trained on them."""
    torch.manual_seed(tasks)
    net = ToyNet(tasks).to(dtype)
    common = 10 * torch.randn(features, labels)
    own = common + 3.5 * torch.randn(tasks, features, labels)
    scales = torch.logspace(0, 2, tasks)
    data = []
    for _ in range(batches):
        x = torch.rand(samples, features)
        y = torch.stack([scale * (x @ matrix).tanh() for scale, matrix in zip(scales, own, strict=True)], dim=1)
        data.append((x.to(dtype), y.to(dtype)))
    return net, data


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
@pytest.mark.parametrize("tasks", [2, 10])
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


@for_each_variant
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_shows_in_the_weights(variant, bad):
    net, data = toy(2, 4)
    data[1][1][0, 0, 0] = bad
    log_weights, log_loss = gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-3, log=True, variant=variant)
    assert np.isfinite(log_weights[:2]).all() and np.isnan(log_weights[2:]).all()
    assert not np.isfinite(log_loss[1, 0])


def arguments(net, data, **changes):
    return {
        "net": net,
        "layer": net.last,
        "alpha": 0.12,
        "dataloader": data,
        "num_epochs": 1,
        "lr1": 1e-3,
        "lr2": 1e-3,
    } | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"variant": "tensorflow"}, ValueError, ["variant", "paper", "lucasbotang", "tensorflow"]),
        ({"alpha": -0.5}, ValueError, ["alpha", "-0.5"]),
        ({"alpha": float("nan")}, ValueError, ["alpha", "nan"]),
        ({"num_epochs": 0}, ValueError, ["num_epochs", "0"]),
        ({"num_epochs": 1.5}, ValueError, ["num_epochs", "1.5"]),
        ({"lr1": -1.0}, ValueError, ["lr1", "-1.0"]),
        ({"lr2": float("inf")}, ValueError, ["lr2", "inf"]),
        ({"layer": nn.ReLU()}, ValueError, ["layer", "ReLU"]),
        ({"layer": torch.zeros(3)}, ValueError, ["layer", "[3]", "require"]),
        ({"layer": ["last"]}, TypeError, ["layer", "str"]),
        ({"layer": nn.Linear(2, 2)}, ValueError, ["losses[0]", "layer"]),
        ({"dataloader": []}, ValueError, ["dataloader", "no batch"]),
        ({"dataloader": [torch.zeros(2, 3)]}, TypeError, ["dataloader", "Tensor"]),
    ],
)
def test_bad_arguments_are_named(changes, error, words):
    net, data = toy(2, 1)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(error) as caught:
        gradNorm(**arguments(net, data, **changes))
    assert all(word in str(caught.value) for word in words)
    assert all(torch.equal(parameter, old) for parameter, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        (lambda losses: list(losses), TypeError, ["[T]", "list"]),
        (lambda losses: losses.sum(), ValueError, ["[T]", "[]"]),
        (lambda losses: losses[None], ValueError, ["[T]", "[1, 2]"]),
        (lambda losses: losses[:0], ValueError, ["[T]", "[0]"]),
        (lambda losses: losses.detach(), ValueError, ["requires_grad=False"]),
    ],
)
def test_bad_losses_of_the_network_are_named(losses, error, words):
    class Bad(ToyNet):
        def forward(self, x, y):
            return losses(super().forward(x, y))

    _, data = toy(2, 1)
    net = Bad(2).double()
    with pytest.raises(error) as caught:
        gradNorm(**arguments(net, data))
    assert all(word in str(caught.value) for word in words)
