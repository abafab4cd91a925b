"""A small model with conflicting tasks, and how it is trained and compared."""

import torch
from torch import nn

import fastpcgrad
from fastpcgrad import reference


class Model(nn.Module):
    """A trunk and one head a task; the trunk's first layer can be made larger than what hooks wait for."""

    def __init__(self, width=6, tasks=3):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))

    def forward(self, x):
        features = self.trunk(x)
        return [head(features) for head in self.heads]


def losses_of(model, x, trunk=None):
    """Losses that conflict: each task wants another output from nearly the same head."""
    outputs = model(x) if trunk is None else [head(trunk(x)) for head in model.heads]
    return [(output - 3 * (-1) ** t).square().mean() for t, output in enumerate(outputs)]


def task_gradients(losses, parameters):
    """In float64, as the oracle wants them."""
    tasks = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [[None if g is None else g.double() for g in task] for task in tasks]


def fixed(optimizer, **options):
    """A wrapper that draws no random numbers."""
    return fastpcgrad.PCGrad(optimizer, variant="tensorflow", **options)


def assert_grad(parameters, expected):
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, None if e is None else e.to(p.dtype))


def assert_merged(parameters, losses, of=None):
    """``.grad`` of ``parameters`` is what the oracle makes of the losses (of parameters like them)."""
    of = parameters if of is None else of
    like = [p.detach().double() for p in of]
    assert_grad(parameters, reference.merge(task_gradients(losses, of), like, "tensorflow"))


def train(model, optimizer, x, steps=3, after_step=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.pc_backward(losses_of(model, x))
        optimizer.step()
        after_step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same_values(model, other):
    torch.testing.assert_close(values(model), values(other), rtol=0, atol=0)
