"""IMTL-L against its oracle, TorchJD and LibMTL, and as a half of IMTL."""

import pytest
import torch
from torch import nn

from fastpcgrad import PCGrad, methods, reference
from fastpcgrad.balancing import IMTLL, UncertaintyWeighting


def scaled(tasks, seed):
    generator = torch.Generator().manual_seed(seed)
    balancer = IMTLL(tasks).double()
    balancer.log_scale.data = torch.randn(tasks, generator=generator, dtype=torch.float64)
    return balancer, (10 * torch.rand(tasks, generator=generator, dtype=torch.float64)).requires_grad_()


def test_value_and_gradients_are_the_oracles_and_torchjds():
    theirs = pytest.importorskip("torchjd.scalarization")
    for seed in range(200):
        balancer, losses = scaled(1 + seed % 7, seed)
        peer = theirs.IMTLL(len(losses)).double()
        peer.load_state_dict(balancer.state_dict())
        s = balancer.log_scale.detach().clone().requires_grad_()
        found = balancer(list(losses)) if seed % 2 else balancer(losses)
        found = sum(found)
        gradients = torch.autograd.grad(found, [losses, balancer.log_scale])
        for value, scales in ((reference.imtl_l(losses, s), s), (peer(losses), peer.log_scale)):
            torch.testing.assert_close(found, value)
            for grad, expected in zip(gradients, torch.autograd.grad(value, [losses, scales]), strict=True):
                torch.testing.assert_close(grad, expected)


def test_it_is_twice_uncertainty_weighting_of_the_other_sign():
    balancer, losses = scaled(4, 0)
    other = UncertaintyWeighting(4).double()
    other.log_variance.data = -balancer.log_scale.data
    torch.testing.assert_close(balancer(losses), 2 * other(losses))


def test_weighted_losses_settle_at_one():
    balancer = IMTLL(2).double()
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.5)
    losses = torch.tensor([0.2, 5.0], dtype=torch.float64)
    for _ in range(60):
        optimizer.zero_grad()
        balancer(losses).sum().backward()
        optimizer.step()
    torch.testing.assert_close(balancer.weights * losses, torch.ones(2, dtype=torch.float64))


def imtl(gradients):
    """The paper's gradient half, as LibMTL writes it: α with equal projections onto unit gradients, and Σ α g."""
    units = gradients / gradients.norm(dim=1, keepdim=True)
    differences, turns = gradients[:1] - gradients[1:], units[:1] - units[1:]
    alpha = gradients[0] @ turns.mT @ torch.inverse(differences @ turns.mT)
    return torch.cat([1 - alpha.sum()[None], alpha]) @ gradients


def test_with_imtlg_it_is_imtl():
    """Both halves over steps of training: the weight by the paper's rule for the scaled losses, s by SGD."""
    torch.manual_seed(0)
    data = torch.randn(20, 4, dtype=torch.float64)
    targets = torch.randn(20, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    ours, by_hand = (nn.Linear(4, 3, bias=False, dtype=torch.float64) for _ in range(2))
    by_hand.load_state_dict(ours.state_dict())
    balancer, s = IMTLL(3).double(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = PCGrad(torch.optim.SGD(ours.parameters(), lr=0.05), method=methods.IMTLG())
    scales = torch.optim.SGD(balancer.parameters(), lr=0.05)
    mixed = torch.ones(4, 4, dtype=torch.float64)  # what all outputs share
    for _ in range(20):
        scales.zero_grad()
        optimizer.pc_backward(list(balancer((ours(data @ mixed * 0.1 + data) - targets).square().mean(dim=0))))
        optimizer.step()
        scales.step()
        optimizer.zero_grad()
        losses = (by_hand(data @ mixed * 0.1 + data) - targets).square().mean(dim=0)
        scaled_losses = s.exp() * losses - s
        rows = [torch.autograd.grad(loss, by_hand.weight, retain_graph=True)[0] for loss in scaled_losses]
        (slope,) = torch.autograd.grad(scaled_losses.sum(), s)
        with torch.no_grad():
            by_hand.weight -= 0.05 * imtl(torch.stack(rows).flatten(1)).view_as(by_hand.weight)
            s -= 0.05 * slope
    torch.testing.assert_close(ours.weight, by_hand.weight)
    torch.testing.assert_close(balancer.log_scale.data, s.data)
    assert s.max() > 0.1 and s.min() < -0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_moves_no_scale(bad):
    balancer = IMTLL(2)
    weighted = balancer(torch.tensor([bad, 3.0]))
    assert not weighted[0].isfinite() and weighted[1].isfinite()
    weighted.sum().backward()
    assert balancer.log_scale.grad.tolist() == [0.0, 2.0]
