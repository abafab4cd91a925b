"""Smooth Tchebycheff weights against autograd through the log-sum-exp."""

import pytest
import torch

from fastpcgrad.balancing import STCH


@pytest.mark.parametrize("mu", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("preference", [None, [0.5, 0.1, 0.4]])
@pytest.mark.parametrize("ideal", [None, [0.1, -0.2, 0.0]])
def test_the_gradient_is_that_of_the_smooth_maximum(mu, preference, ideal):
    losses = (torch.rand(3, dtype=torch.float64) + 0.1).requires_grad_()
    balancer = STCH(3, mu, preference, ideal).double()
    chosen = torch.tensor(preference or [1 / 3] * 3).double()  # through fp32, as the balancer has them
    excess = chosen * (losses - torch.tensor(ideal or [0.0] * 3).double())
    (expected,) = torch.autograd.grad(mu * torch.log((excess / mu).exp().sum()), losses)
    (found,) = torch.autograd.grad(balancer(losses).sum(), losses)
    torch.testing.assert_close(found, expected)


def test_on_logarithms_it_is_what_libmtl_computes():
    """There μ log Σ exp(log(L / L_nadir) / μ) · T."""
    losses = (torch.rand(4, dtype=torch.float64) + 0.1).requires_grad_()
    nadir = torch.rand(4, dtype=torch.float64) + 0.1
    logs = (losses / nadir + 1e-20).log()
    (expected,) = torch.autograd.grad(0.3 * torch.log((logs / 0.3).exp().sum()) * 4, losses)
    balancer = STCH(4, mu=0.3, preference=[1.0] * 4).double()
    (found,) = torch.autograd.grad(4 * balancer((losses / nadir + 1e-20).log()).sum(), losses)
    torch.testing.assert_close(found, expected)


def test_weights_worked_by_hand():
    """Exponents 0 and ln 3: a quarter and three quarters, each times its preference."""
    balancer = STCH(2, mu=1.0, preference=[1.0, 2.0], ideal=[1.0, 0.0])
    balancer(torch.tensor([1.0, 3.0]).log() / torch.tensor([1.0, 2.0]) + torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(balancer.weights, torch.tensor([0.25, 1.5]))


def test_a_small_mu_leaves_the_largest_alone_without_overflow():
    balancer = STCH(3, mu=1e-6, preference=[1.0] * 3)
    balancer(torch.tensor([1e4, 3e4, 2e4]))
    assert balancer.weights.tolist() == [0.0, 1.0, 0.0]


def test_the_state_holds_preference_and_ideal():
    balancer, resumed = STCH(2, 0.5, [0.2, 0.8], [0.1, 0.0]), STCH(2, 0.5)
    balancer(torch.rand(2))
    resumed.load_state_dict(balancer.state_dict())
    assert torch.equal(balancer(torch.ones(2)), resumed(torch.ones(2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_weighed_as_the_losses_before_it(bad):
    balancer = STCH(3, mu=1.0)
    before = balancer(torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([1.0, 2.0, 3.0])
    weighted = balancer(torch.tensor([1.0, bad, 1.0]))
    torch.testing.assert_close(balancer.weights, before)
    assert torch.equal(weighted[::2], balancer.weights[::2]) and not weighted[1].isfinite()


def test_mu_has_the_usual_value():
    losses = torch.tensor([1.0, 3.0])
    assert torch.equal(STCH(2)(losses), STCH(2, mu=1.0)(losses))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mu": 0.0}, ["mu", "0.0"]),
        ({"mu": float("nan")}, ["mu", "nan"]),
        ({"preference": [1.0]}, ["preference", "2", "[1.0]"]),
        ({"preference": [1.0, 0.0]}, ["preference", "> 0", "0.0"]),
        ({"ideal": [0.0, 0.0, 0.0]}, ["ideal", "2"]),
        ({"ideal": [0.0, float("nan")]}, ["ideal", "nan"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as caught:
        STCH(2, **({"mu": 1.0} | arguments))
    assert all(word in str(caught.value) for word in words)
