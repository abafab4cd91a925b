"""The toy problem, small."""

import pytest
import torch
from torch import nn

VARIANTS = ("paper", "lucasbotang")
STEPS = 100
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
