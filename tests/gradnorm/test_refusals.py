"""What gradNorm refuses: losses without a power, and bad arguments."""

import numpy as np
import pytest
import torch
from torch import nn

from fastpcgrad.gradnorm import gradNorm
from tests.balancing.late_answers import never_look

from .toy import ToyNet, for_each_variant, toy


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
