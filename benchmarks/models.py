"""The multi-task models whose training step is measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import TABLES, TINY_GPT, WIDTHS, Batch, Gpt, StepCase

MLPS: dict[str, tuple[int, int, int]] = {
    "mlp 0.94M": (256, 512, 4),
    "mlp 0.17M": (64, 256, 3),
    **{name: (w, w, 4) for name, w in WIDTHS.items()},
}
"""What goes in, the width and number of hidden layers, of those that are smaller than the one of this size:"""
# 512 -> 5 hidden layers of this width, and heads of 10 classes: 13.6 M parameters at T=4, 13.7 M at T=8.
MLP_WIDTH = 1776
CLASSES = 10
HEAD_WIDTH = 64
"""Of the attention of ``GptTrunk``."""


@dataclass(frozen=True)
class Forward:
    """T losses, and the last representation that all tasks share where the model has one."""

    losses: list[Tensor]
    features: Tensor | None


class Problem(nn.Module):
    """A model of T tasks with its fixed batch: ``forward`` builds the losses anew."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def parameters_list(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def forward(self) -> Forward:
        raise NotImplementedError

    def loss(self, task: int) -> Tensor:
        """Of one task, by a forward of its own."""
        losses: list[Tensor] = self().losses
        return losses[task]


class Tutorial(Problem):
    """A 10-50-1 regression net; each of the T losses comes from its own forward of the one model."""

    inputs: Tensor
    targets: Tensor

    def __init__(self, tasks: int, batch: int) -> None:
        super().__init__(tasks)
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
        super().__init__(tasks)
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

    def loss(self, task: int) -> Tensor:
        return nn.functional.cross_entropy(self.heads[task](self.trunk(self.inputs)), self.labels[task])


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


class GptBlock(nn.Module):
    """Causal self-attention and a GELU network four times as wide, each behind a norm and beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        joint = self.queries_keys_values(self.before_attention(x))
        q, k, v = joint.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        grown: Tensor = x + self.network(self.before_network(x))
        return grown


class GptTrunk(nn.Module):
    """Tokens ``[batch, length]`` to the representation of the last position, ``[batch, width]``."""

    def __init__(self, size: Gpt) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(GptBlock(size.width) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        last: Tensor = self.norm(self.blocks(x))[:, -1]
        return last


def mlp_trunk(width: int, inputs: int = 512, hidden: int = 5) -> nn.Sequential:
    widths = [inputs] + [width] * hidden
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


class LookUp(nn.Module):
    """Sixteen entries of a table, with sparse gradients or dense ones, and an MLP over them."""

    ENTRIES, WIDTH, OUT = 16, 32, 256

    def __init__(self, size: int, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(size, self.WIDTH, sparse=sparse)
        self.layers = mlp_trunk(self.OUT, self.ENTRIES * self.WIDTH, 2)

    def forward(self, numbers: Tensor) -> Tensor:
        found: Tensor = self.layers(self.table(numbers).flatten(1))
        return found


def _recommender(size: int, sparse: bool, batch: int, tasks: int) -> Classifier:
    return Classifier(LookUp(size, sparse), torch.randint(0, size, (batch, LookUp.ENTRIES)), LookUp.OUT, tasks)


def build(case: StepCase, device: str = "cpu") -> Problem:
    """On one device always the same parameters and batch, so every subject gets its own equal copy."""
    torch.manual_seed(0)
    with torch.device(device):  # made there: on a CPU a large one would take seconds
        return _built(case)


def _built(case: StepCase) -> Problem:
    tasks, batch = case.tasks, case.batch
    if isinstance(case.model, Gpt):
        return Classifier(GptTrunk(case.model), _tokens(case.model.vocabulary, batch), case.model.width, tasks)
    if case.model == "tutorial":
        return Tutorial(tasks, batch.sequences)
    if case.model == "mlp":
        return Classifier(mlp_trunk(MLP_WIDTH), torch.randn(batch.sequences, 512), MLP_WIDTH, tasks)
    if case.model in MLPS:
        inputs, width, hidden = MLPS[case.model]
        return Classifier(mlp_trunk(width, inputs, hidden), torch.randn(batch.sequences, inputs), width, tasks)
    if case.model in TABLES:
        return _recommender(*TABLES[case.model], batch.sequences, tasks)
    if case.model == "wide transformer":
        return Classifier(MeanPooledEncoder(1000, 512, 2), _tokens(1000, batch), 512, tasks)
    tokens = _tokens(4000, batch)
    return Classifier(MeanPooledEncoder(4000, 256, 8), tokens, 256, tasks)


def _tokens(vocabulary: int, batch: Batch) -> Tensor:
    return torch.randint(0, vocabulary, (batch.sequences, batch.length))


def build_small(case: StepCase, device: str = "cpu") -> Problem:
    """The same kind of model, small: for warm-ups, and for the check that precedes the timing."""
    if isinstance(case.model, Gpt):
        return build(StepCase(TINY_GPT, case.tasks, TINY_GPT.batch), device)
    torch.manual_seed(0)
    if case.model == "tutorial":
        return Tutorial(case.tasks, 16)
    if case.model.startswith("mlp"):
        return Classifier(mlp_trunk(24, inputs=12, hidden=3), torch.randn(8, 12), 24, case.tasks)
    if case.model in TABLES:
        return _recommender(50, TABLES[case.model][1], 8, case.tasks)
    return Classifier(MeanPooledEncoder(50, 16, 2), _tokens(50, Batch(4, 6)), 16, case.tasks)


def width_of(case: StepCase) -> int:
    """N, of a model without memory."""
    return sum(p.numel() for p in build(case, "meta").parameters())


def clear_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
