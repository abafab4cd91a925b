"""The multi-task models whose training step is measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import StepCase

# 512 -> 5 hidden layers of this width, and heads of 10 classes: 13.6 M parameters at T=4, 13.7 M at T=8.
MLP_WIDTH = 1776
CLASSES = 10


@dataclass(frozen=True)
class Forward:
    """T losses, and the last representation that all tasks share where the model has one."""

    losses: list[Tensor]
    features: Tensor | None


class Problem(nn.Module):
    """A model with its fixed batch: ``forward`` builds the losses anew."""

    def parameters_list(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def forward(self) -> Forward:
        raise NotImplementedError


class Tutorial(Problem):
    """A 10-50-1 regression net; each of the T losses comes from its own forward of the one model."""

    inputs: Tensor
    targets: Tensor

    def __init__(self, tasks: int, batch: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
        self.register_buffer("inputs", torch.randn(batch, 10))
        self.register_buffer("targets", torch.randn(tasks, batch, 1))

    def forward(self) -> Forward:
        outputs = [self.net(self.inputs) for _ in self.targets]
        losses = [nn.functional.mse_loss(out, target) for out, target in zip(outputs, self.targets, strict=True)]
        return Forward(losses, None)


class Classifier(Problem):
    """A shared trunk and one linear head a task, cross-entropy; one forward of the trunk serves all tasks."""

    inputs: Tensor
    labels: Tensor

    def __init__(self, trunk: nn.Module, inputs: Tensor, width: int, tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(tasks))
        self.register_buffer("inputs", inputs)
        self.register_buffer("labels", torch.randint(0, CLASSES, (tasks, inputs.shape[0])))

    def forward(self) -> Forward:
        features = self.trunk(self.inputs)
        losses = [
            nn.functional.cross_entropy(head(features), label)
            for head, label in zip(self.heads, self.labels, strict=True)
        ]
        return Forward(losses, features)


class MeanPooledEncoder(nn.Module):
    """Token embedding, ``torch.nn.TransformerEncoder``, mean over the positions."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.encoder(self.embedding(tokens)).mean(dim=1)
        return pooled


def mlp_trunk(width: int, inputs: int = 512, hidden: int = 5) -> nn.Sequential:
    widths = [inputs] + [width] * hidden
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def build(case: StepCase, seed: int = 0) -> Problem:
    """The same seed gives the same parameters and batch, so every subject gets its own equal copy."""
    torch.manual_seed(seed)
    if case.model == "tutorial":
        return Tutorial(case.tasks, case.batch)
    if case.model == "mlp":
        return Classifier(mlp_trunk(MLP_WIDTH), torch.randn(case.batch, 512), MLP_WIDTH, case.tasks)
    tokens = torch.randint(0, 4000, (case.batch, 64))
    return Classifier(MeanPooledEncoder(4000, 256, 8), tokens, 256, case.tasks)


def build_small(case: StepCase, seed: int = 0) -> Problem:
    """The same kind of model, small: for the check that precedes the timing."""
    torch.manual_seed(seed)
    if case.model == "tutorial":
        return Tutorial(case.tasks, 16)
    if case.model == "mlp":
        return Classifier(mlp_trunk(24, inputs=12, hidden=3), torch.randn(8, 12), 24, case.tasks)
    return Classifier(MeanPooledEncoder(50, 16, 2), torch.randint(0, 50, (4, 6)), 16, case.tasks)


def clear_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
