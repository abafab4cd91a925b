"""gradNorm against oracles that differentiate twice, written from the paper and from the original's description."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastpcgrad import FastPCGradWarning
from fastpcgrad.gradnorm import gradNorm
from tests.balancing.late_answers import never_look

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


@pytest.fixture(params=["looking", "not looking"])
def looks(request, monkeypatch):
    """A CPU's way, which looks at flags, and a GPU's."""
    return None if request.param == "looking" else never_look(monkeypatch)


def poisoned(batch, bad, where):
    """The loss of the first task is not finite, or its norm alone."""
    x, y = (values.clone() for values in batch)
    if where == "loss":
        y[0, 0, 0] = bad
    else:
        x[0, 0] = BENT
    return x, y


BENT = 0.123456789
"""Marks a batch whose gradients are to be NaN, its losses not."""


class BentNet(ToyNet):
    def forward(self, x, y):
        losses = super().forward(x, y)
        if x[0, 0] == BENT:
            losses.register_hook(lambda grad: grad * torch.nan)
            losses = losses * 1
        return losses


@for_each_variant
@pytest.mark.parametrize("where", ["loss", "norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [(0,), (1,), (0, 0, 3), (2, 3)])
def test_a_batch_that_is_not_finite_is_skipped_shows_in_the_log_and_is_told(looks, variant, where, bad, places):
    net, data = toy(3, 4)
    bent = BentNet(3).double()
    bent.load_state_dict(net.state_dict())
    fed, bad_rows = [], []
    for index, batch in enumerate(data):
        for _ in range(places.count(index)):
            bad_rows.append(len(fed))
            fed.append(poisoned(batch, bad, where))
        fed.append(batch)
    expected = gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-2, log=True, variant=variant)
    with pytest.warns(FastPCGradWarning, match=f"skipped {len(places)} of {len(fed)} batches"):
        found = gradNorm(bent, bent.last, 0.12, fed, 1, 1e-3, 1e-2, log=True, variant=variant)
    for logged, alone in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.delete(logged, bad_rows, axis=0), alone)
    assert np.isfinite(found[0]).all()
    assert np.isfinite(found[1][bad_rows]).all() == (where == "norm" and places[0] > 0), "L(0) may not be known yet"
    for parameter, other in zip(bent.parameters(), net.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("log", [True, False])
def test_a_run_of_bad_batches_alone_leaves_the_network(looks, log):
    net, data = toy(2, 3)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    data = [poisoned(batch, float("nan"), "loss") for batch in data]
    with pytest.warns(FastPCGradWarning, match="skipped 6 of 6"):
        log_weights, log_loss = gradNorm(net, net.last, 0.12, data, 2, 1e-3, 1e-3, log=log)
    assert (log_weights == 1).all() and np.isnan(log_loss).all() and len(log_loss) == 6 * log
    assert all(torch.equal(parameter, old) for parameter, old in zip(net.parameters(), before, strict=True))


def test_a_network_with_complex_parameters_skips_too(looks):
    """No fused optimizer takes them."""

    class ComplexNet(ToyNet):
        def __init__(self, tasks):
            super().__init__(tasks)
            self.phase = nn.Parameter(torch.ones(tasks, dtype=torch.complex128))

        def forward(self, x, y):
            return super().forward(x, y) * self.phase.abs()

    _, data = toy(2, 3)
    data = [poisoned(data[0], float("nan"), "loss"), *data]
    net = ComplexNet(2).double()
    alone = copy.deepcopy(net)
    with pytest.warns(FastPCGradWarning, match="skipped 1 of 4"):
        gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-3)
    gradNorm(alone, alone.last, 0.12, data[1:], 1, 1e-3, 1e-3)
    for parameter, other in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter, other)


class Shifted(nn.Module):
    """Losses a² + shift_i: any sign, with gradients that do not depend on it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))

    def forward(self, shift):
        return torch.stack([self.a.square().sum(), (self.a - 4).square().sum()]) + shift


def shifts(*rows):
    return [(torch.tensor(row, dtype=torch.float64),) for row in rows]


GOOD = shifts(*[[0.0, 0.0]] * 3)
REFUSED = {
    "a first loss of 0": (shifts([-5.0, 0.0]), r"losses\[0\] is 0 and its L\(0\) 0"),
    "a first loss below 0": (shifts([0.0, -18.0]), r"losses\[1\] is -5 and its L\(0\) -5"),
    "another sign": (shifts([0.0, 0.0], [0.0, 0.0], [-50.0, 0.0]), r"losses\[0\] is -4\d\.\d+ and its L\(0\) 5"),
}


@for_each_variant
@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=REFUSED)
def test_losses_without_a_power_are_refused_before_the_step(variant, data, words):
    net, alone = Shifted(), Shifted()
    with pytest.raises(ValueError, match=f"{words}.*STCH"):
        gradNorm(net, net.a, 0.12, data + GOOD, 1, 0.1, 0.1, variant=variant)
    if data[:-1]:
        gradNorm(alone, alone.a, 0.12, data[:-1], 1, 0.1, 0.1, variant=variant)
    assert torch.equal(net.a, alone.a)


@for_each_variant
@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=REFUSED)
def test_where_looking_would_wait_they_take_no_step_and_the_end_raises(monkeypatch, variant, data, words):
    never_look(monkeypatch)
    net, alone = Shifted(), Shifted()
    with pytest.raises(ValueError, match=f"{words}.*STCH.*earlier call"):
        gradNorm(net, net.a, 0.12, data + GOOD, 1, 0.1, 0.1, variant=variant)
    gradNorm(alone, alone.a, 0.12, data[:-1] + GOOD, 1, 0.1, 0.1, variant=variant)
    assert torch.equal(net.a, alone.a)


class Scaled(nn.Module):
    """Losses scale_i · a + shift_i with a = 1: their norms are the scales."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, scale, shift):
        return scale * self.a + shift


def test_weights_that_cannot_be_scaled_are_those_before(looks):
    """Norms 3 and 1, ratios 1.9 and 0.1, α = ½: both norms are too large, and a step of 1 leaves no weight."""
    data = [[torch.tensor(row) for row in batch] for batch in (([1.0, 1.0], [0.0, 0.0]), ([3.0, 1.0], [-1.1, -0.9]))]
    net = Scaled()
    log_weights, _ = gradNorm(net, net.a, 0.5, [*data, data[0]], 1, 0.0, 1.0, log=True)
    assert (log_weights == 1).all()


def test_an_answer_that_comes_early_raises_before_the_next_step(monkeypatch):
    answers = never_look(monkeypatch)
    net = Shifted()

    def data():
        yield from shifts([-50.0, 0.0])
        answers.arrive()
        yield from shifts([0.0, 0.0])

    with pytest.raises(ValueError, match=r"losses\[0\] is -45 .*earlier call"):
        gradNorm(net, net.a, 0.12, data(), 1, 0.1, 0.1)
    assert net.a.tolist() == [2.0, 1.0]


@for_each_variant
def test_without_a_restoring_force_losses_may_have_any_sign(looks, variant):
    runs = []
    for data in (GOOD, shifts([-5.0, -20.0], [3.0, -20.0], [-90.0, 20.0])):
        net = Shifted()
        log_weights, _ = gradNorm(net, net.a, 0.0, data, 1, 0.1, 0.1, log=True, variant=variant)
        runs.append((log_weights, net.a.detach().numpy()))
    for signed, positive in zip(*runs, strict=True):
        np.testing.assert_array_equal(signed, positive)
    assert np.abs(runs[0][0][1] - 1).max() > 0.05


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
        (lambda losses: losses[:, None, None], ValueError, ["[T]", "[2, 1, 1]"]),
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
