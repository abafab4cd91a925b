"""Uncertainty weighting against its formula."""

import pytest
import torch
from torch import nn

from fastpcgrad import GradientSurgery, methods
from fastpcgrad.balancing import UncertaintyWeighting


def formula(losses, s):
    """Σ L / (2 exp(s)) + s / 2, as LibMTL writes it."""
    return (losses / (2 * s.exp()) + s / 2).sum()


def test_value_and_gradients_are_the_formulas():
    losses = (torch.rand(5, dtype=torch.float64) * 10).requires_grad_()
    balancer = UncertaintyWeighting(5).double()
    nn.init.normal_(balancer.log_variance)
    s = balancer.log_variance.detach().clone().requires_grad_()
    for weighted in (balancer(losses).sum(), sum(balancer(list(losses)))):
        expected = formula(losses, s)
        torch.testing.assert_close(weighted, expected)
        found = torch.autograd.grad(weighted, [losses, balancer.log_variance])
        for grad, by_formula in zip(found, torch.autograd.grad(expected, [losses, s]), strict=True):
            torch.testing.assert_close(grad, by_formula)


def test_a_step_worked_by_hand():
    """At s = 0 the derivative by s_i is ½ (1 − L_i)."""
    balancer = UncertaintyWeighting(2)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.5)
    sum(balancer([torch.tensor(5.0), torch.tensor(1.0)])).backward()
    optimizer.step()
    torch.testing.assert_close(balancer.log_variance.data, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(balancer.weights, torch.tensor([0.5 / torch.e, 0.5]))


def test_s_settles_where_its_exponential_is_the_loss():
    balancer = UncertaintyWeighting(2).double()
    optimizer = torch.optim.SGD(balancer.parameters(), lr=1.0)
    losses = torch.tensor([0.2, 5.0], dtype=torch.float64)
    for _ in range(200):
        optimizer.zero_grad()
        balancer(losses).sum().backward()
        optimizer.step()
    torch.testing.assert_close(balancer.log_variance.exp().data, losses)


def test_a_resumed_run_gives_the_same_numbers():
    balancer, resumed = UncertaintyWeighting(3), UncertaintyWeighting(3)
    nn.init.normal_(balancer.log_variance)
    resumed.load_state_dict(balancer.state_dict())
    assert torch.equal(resumed(torch.ones(3)), balancer(torch.ones(3)))


def test_under_surgery_each_s_gets_the_gradient_of_its_own_task():
    x = torch.randn(4, requires_grad=True)
    balancer = UncertaintyWeighting(2)
    surgery = GradientSurgery([x], num_tasks=2, method=methods.PCGrad())
    losses = [3 * x.square().sum(), (x - 1).square().sum()]
    for t, loss in enumerate(balancer(losses)):
        with surgery.task(t):
            loss.backward(retain_graph=True)
    surgery.merge()
    torch.testing.assert_close(balancer.log_variance.grad, (1 - torch.stack(losses).detach()) / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_shows_in_its_own_task_alone(bad):
    balancer = UncertaintyWeighting(2)
    weighted = balancer(torch.tensor([bad, 1.0]))
    assert not weighted[0].isfinite() and weighted[1].isfinite()
    weighted.sum().backward()
    assert balancer.log_variance.grad.tolist() == [0.0, 0.0]  # ½ (1 − 1) of the other task
