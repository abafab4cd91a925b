"""Losses of heads on a trunk, J by autograd alone, and what a surgery has to make of it."""

import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods

TASKS = 3
ALIKE = 1e-6


def trunk_and_heads(width=16, dtype=torch.float32, rows=5):
    """Two layers and a head a task, and what goes in."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(TASKS))
    return nn.ModuleList([trunk, heads]).to(dtype), torch.randn(rows, width, dtype=dtype)


def losses_of_heads(net, x):
    h = net[0](x)
    return [(head(h) - t).square().mean() for t, head in enumerate(net[1])]


def rows_of(losses, parameters):
    """J in float64, by autograd alone."""
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([flattened(row, parameters) for row in found]).double()


def flattened(gradients, parameters):
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def assert_merged(parameters, rows, report, tolerance=ALIKE):
    """``.grad`` is w J for these rows and the report's w, and G is theirs."""
    merged = flattened([p.grad for p in parameters], parameters).double()
    lengths = rows.norm(dim=1)
    assert ((report.gram - rows @ rows.T).abs() <= tolerance * lengths[:, None] * lengths).all()
    assert (
        torch.linalg.vector_norm(merged - report.weights @ rows) <= tolerance * (report.weights.abs() * lengths).sum()
    )


def surgery_of(parameters, method=None, **options):
    return fastpcgrad.GradientSurgery(
        parameters, TASKS, method or methods.PCGrad("tensorflow"), **{"rows": "factored", **options}
    )


class Hidden(torch.autograd.Function):
    """Runs a backward pass within its own, of which the graph shows nothing."""

    @staticmethod
    def forward(ctx, h, module):
        ctx.save_for_backward(h)
        ctx.module = module
        return module(h)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            h = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.module(h).backward(grad)
        return h.grad, None
