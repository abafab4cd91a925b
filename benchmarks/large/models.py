"""A GPT-style transformer with a classification head a task on its last position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.large.cases import HEAD_WIDTH, Batch, Size
from benchmarks.models import Classifier


class Block(nn.Module):
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


class Gpt(nn.Module):
    """Tokens ``[batch, length]`` to the representation of the last position, ``[batch, width]``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        last: Tensor = self.norm(self.blocks(x))[:, -1]
        return last


class TaskedGpt(Classifier):
    """``loss(t)`` runs the transformer for one task; calling it runs it once for all of them."""

    def __init__(self, size: Size, tasks: int, batch: Batch) -> None:
        tokens = torch.randint(0, size.vocabulary, (batch.sequences, batch.length))
        super().__init__(Gpt(size), tokens, size.width, tasks)

    def loss(self, task: int) -> Tensor:
        logits = self.heads[task](self.trunk(self.inputs))
        return nn.functional.cross_entropy(logits, self.labels[task])


def build(size: Size, tasks: int, batch: Batch, device: str = "cpu") -> TaskedGpt:
    """On one device always the same parameters and batch."""
    torch.manual_seed(0)
    with torch.device(device):  # made there: on a CPU this would take seconds
        return TaskedGpt(size, tasks, batch)
