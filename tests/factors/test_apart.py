"""What a graph shows of samples that are apart, held against the derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpcgrad
from fastpcgrad.rows import samples
from fastpcgrad.rows.apart import are_apart
from fastpcgrad.rows.products import Graph

B, WIDTH = 4, 6
Y = torch.tensor([0, 5, 2, 2])
W = torch.randn(WIDTH, WIDTH, requires_grad=True)
V = torch.randn(WIDTH, requires_grad=True)
OTHER = torch.randn(B, WIDTH)
SQUARE = torch.randn(WIDTH, B, requires_grad=True)


class Relu(torch.autograd.Function):
    """Of somebody else's: its node is ``ReluBackward``, that of torch ``ReluBackward0``."""

    @staticmethod
    def forward(ctx, h):
        return h.flip(0)

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(0)


APART = {
    "cross entropy": lambda h: F.cross_entropy(h, Y, reduction="none"),
    "weighted classes": lambda h: F.nll_loss(h.log_softmax(-1), Y, torch.ones(WIDTH), reduction="none"),
    "mse": lambda h: F.mse_loss(h, OTHER, reduction="none").sum(-1),
    "smooth l1": lambda h: F.smooth_l1_loss(h, OTHER, reduction="none").mean(1),
    "binary": lambda h: F.binary_cross_entropy_with_logits(h[:, 0], OTHER[:, 0].sigmoid(), reduction="none"),
    "layers": lambda h: (F.layer_norm(h, (WIDTH,), V, V).relu() @ W.t() + V).tanh().square().sum(dim=(-1,)),
    "residual": lambda h: (h + F.gelu(torch.addmm(V, h, W))).logsumexp(1),
    "two layers of the same": lambda h: ((h @ W).sigmoid() @ W)[:, 1],
    "added rows": lambda h: torch.addmm(h, h, W).sum(1),
    "positions": lambda h: F.linear(h.view(B, 2, 3), W[:3, :3].detach()).view(B * 2, 3).square().view(B, -1).sum(1),
    "broadcast": lambda h: (h * h[:, :1]).sum(1),
    "gathered": lambda h: h.log_softmax(1).gather(1, Y[:, None])[:, 0].neg(),
    "detached statistics": lambda h: (h - h.detach().mean(0)).square().sum(1),
    "table": lambda h: (h @ W).sum(1) * SQUARE.t().sum(1),
}
MIXED = {
    "mean over the batch": lambda h: (h - h.mean(0)).square().sum(1),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True).square().sum(1),
    "softmax over the batch": lambda h: h.softmax(0).sum(1),
    "similarities": lambda h: (h @ h.t()).square().sum(1),
    "weights made of samples": lambda h: (SQUARE.detach().t() @ (h.t() @ h)).sum(1),
    "products of samples": lambda h: (h[:, :B] @ h[:, :B]).sum(1),
    "rows in another order": lambda h: h.sum(1)[[1, 0, 3, 2]],
    "flipped": lambda h: h.flip(0).sum(1),
    "transposed": lambda h: (h[:, :B] * h[:, :B].t()).sum(1),
    "seen as other rows": lambda h: h.view(WIDTH, B).t().sum(1),
    "half of the samples": lambda h: (h.view(2, -1) * 2).view(B, WIDTH).sum(1) + h.view(2, -1).sum(1).repeat(2),
    "a dimension of one": lambda h: (h.sum(1)[None] * torch.ones(B, 1)).sum(1),
    "added along": lambda h: h.cumsum(0).sum(1),
    "named as a node of torch": lambda h: Relu.apply(h).sum(1),
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0].sum(1),
}
UNKNOWN = {
    "batch norm of a trained model": lambda h: F.batch_norm(h, torch.zeros(WIDTH), torch.ones(WIDTH)).sum(1),
    "convolution": lambda h: F.conv1d(h[:, None], W[:1, None, :3].detach()).flatten(1).sum(1),
}


def is_block_diagonal(loss_of, h):
    jacobian = torch.autograd.functional.jacobian(loss_of, h)
    others = ~torch.eye(B, dtype=torch.bool)
    return not jacobian[others].any()


@pytest.mark.parametrize("loss_of", APART.values(), ids=APART)
def test_known_nodes_keep_samples_apart(loss_of):
    torch.manual_seed(0)
    h = torch.randn(B, WIDTH, requires_grad=True)
    assert is_block_diagonal(loss_of, h)
    assert are_apart(Graph([loss_of(h * 1)]), B)


@pytest.mark.parametrize("loss_of", [*MIXED.values(), *UNKNOWN.values()], ids=[*MIXED, *UNKNOWN])
def test_nothing_is_said_of_other_nodes(loss_of):
    torch.manual_seed(0)
    h = torch.randn(B, WIDTH, requires_grad=True)
    assert is_block_diagonal(loss_of, h) == (loss_of in UNKNOWN.values())
    assert not are_apart(Graph([loss_of(h * 1)]), B)


def test_one_sample_and_losses_that_are_leaves():
    assert not are_apart(Graph([(torch.randn(1, WIDTH, requires_grad=True) * 1).sum(1)]), 1)
    assert not are_apart(Graph([torch.randn(B, requires_grad=True)]), B)


class TestPasses:
    """Samples that are apart by what the graph shows are tried again once it may hide a hook."""

    @pytest.fixture
    def gram(self, monkeypatch):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        x, tried = torch.randn(B, WIDTH), []

        def scales(losses):
            tried.append(1)
            return torch.exp2(torch.arange(len(losses), dtype=losses.dtype))

        monkeypatch.setattr(samples, "_scales", scales)

        def gram(hook=None):
            tried.clear()
            h = net[:2](x)
            if hook is not None:
                h.register_hook(hook)
            losses = F.cross_entropy(net[2](h), Y, reduction="none")
            rows = [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters(), retain_graph=True)])
                for loss in losses
            ]
            found = fastpcgrad.gramian(losses, list(net.parameters()), batch_dim=0)
            J = torch.stack(rows).double()
            torch.testing.assert_close(found, J @ J.T, rtol=1e-5, atol=1e-7)
            return len(tried)

        gram(lambda grad: grad)  # the hook makes the next graph the first one
        return gram

    def test_one_pass_where_nobody_registers_hooks(self, gram):
        assert gram() == gram() == 0

    def test_two_after_a_hook(self, gram):
        assert gram(lambda grad: 2 * grad) == 1
        assert gram() == 0

    def test_a_hook_that_mixes_samples_is_found(self, gram):
        assert gram() == 0
        with pytest.raises(ValueError, match="reaches rows of others"):
            gram(lambda grad: grad - grad.mean(dim=0))
