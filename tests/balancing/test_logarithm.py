"""Logarithm against autograd through the logarithm, and DB-MTL as a whole."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import balancing, methods


def test_the_gradient_is_that_of_the_logarithms():
    for scale in (1e-9, 1e-3, 1.0, 1e6):
        losses = (scale * (torch.rand(4, dtype=torch.float64) + 0.1)).requires_grad_()
        (expected,) = torch.autograd.grad((losses + 1e-8).log().sum(), losses)
        (found,) = torch.autograd.grad(balancing.Logarithm(4).double()(losses).sum(), losses)
        torch.testing.assert_close(found, expected)


def test_a_loss_without_a_logarithm_is_refused_and_one_that_is_not_finite_is_weighed_as_before():
    balancer = balancing.Logarithm(2)
    balancer(torch.tensor([2.0, 4.0]))
    for loss in (-1.0, -2e-8):
        with pytest.raises(ValueError, match=r"losses\[1\] is .*log\(L \+ 1e-8\).*STCH"):
            balancer(torch.tensor([1.0, loss]))
    weighted = balancer(torch.tensor([1.0, torch.nan]))
    assert weighted[0] == 0.5 and weighted[1].isnan()
    assert balancer.weights.tolist() == [0.5, 0.25]
    assert balancer(torch.tensor([1.0, 0.0])).isfinite().all()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh()).double()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 1).double() for _ in range(3))

    def losses(self, step):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return [
            10.0**t * (head(self.trunk(x)).squeeze() - x[:, t]).square().mean() for t, head in enumerate(self.heads)
        ]


@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.5, 0.5)])
def test_with_the_method_it_is_libmtls_db_mtl(beta, sigma):
    """Trajectories: there the trunk gets the merged gradient, each head that of the logarithm of its loss."""
    ours, theirs = Net(), Net()
    method = methods.DBMTL(beta, sigma)
    optimizer = fastpcgrad.PCGrad(
        torch.optim.SGD(ours.parameters(), lr=0.05), method=method, shared=ours.trunk.parameters()
    )
    logarithm = balancing.Logarithm(3).double()
    plain, trunk = torch.optim.SGD(theirs.parameters(), lr=0.05), list(theirs.trunk.parameters())
    buffer = torch.zeros(3, sum(p.numel() for p in trunk), dtype=torch.float64)
    for step in range(1, 21):
        optimizer.zero_grad()
        optimizer.pc_backward(logarithm(ours.losses(step)))
        optimizer.step()

        logs = [(loss + 1e-8).log() for loss in theirs.losses(step)]
        grads = [torch.autograd.grad(log, trunk, retain_graph=True) for log in logs]
        batch = torch.stack([torch.cat([g.flatten() for g in own]) for own in grads])
        buffer = batch + (beta / step**sigma) * (buffer - batch)
        norms = buffer.norm(dim=-1)
        merged = (norms.max() / (norms + 1e-8)) @ buffer
        plain.zero_grad()
        sum(logs).backward()
        for p, grad in zip(trunk, merged.split([p.numel() for p in trunk]), strict=True):
            p.grad = grad.view_as(p)
        plain.step()
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-8, atol=1e-10)
