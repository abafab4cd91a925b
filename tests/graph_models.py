"""Small models whose backward graphs differ in what makes them hard to cut; each gives losses of one graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

WIDTH = 6


def losses_of(output, tasks):
    """Losses that pull an output in different directions."""
    targets = torch.randn(tasks, *output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return [mse_loss(output, target.to(output)) for target in targets]


class Model(nn.Module):
    """``forward(tasks)`` gives the losses."""

    def __init__(self):
        super().__init__()
        self.x = torch.randn(4, WIDTH)

    def _apply(self, fn, recurse=True):
        self.x = fn(self.x)
        return super()._apply(fn, recurse)


class MLP(Model):
    def __init__(self, layers=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, tasks):
        h = self.x
        for layer in self.layers:
            h = layer(h).tanh()
        return losses_of(h, tasks)


class Heads(MLP):
    """A head a task besides; the last is that of nobody."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(6))

    def forward(self, tasks):
        return list(map(self.loss, range(tasks), repeat(self.trunk())))

    def trunk(self):
        h = self.x
        for layer in self.layers:
            h = layer(h).tanh()
        return h

    def loss(self, t, h):
        return losses_of(self.heads[t](h), t + 1)[t]


class HeadsInThreads(Heads):
    """Each thread numbers its nodes by itself, so that those of the heads come before those of the trunk."""

    def forward(self, tasks):
        h = self.trunk()
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.loss, range(tasks), repeat(h)))


class Residual(MLP):
    def forward(self, tasks):
        h = self.x
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            h = h + second(first(h).relu())
        return losses_of(h, tasks)


class LongSkips(MLP):
    """As in a U-Net: what an early layer gives is used again by a late one, the first by the last."""

    def forward(self, tasks):
        h, kept = self.x, []
        for layer in self.layers[:3]:
            h = layer(h).tanh()
            kept.append(h)
        for layer in self.layers[3:]:
            h = layer(torch.cat([h, kept.pop()], dim=1)[:, ::2]).tanh()
        return losses_of(h, tasks)


class Dense(MLP):
    """Each layer sees the sum of all before it."""

    def forward(self, tasks):
        seen = [self.x]
        for layer in self.layers:
            seen.append(layer(sum(seen)).tanh())
        return losses_of(sum(seen), tasks)


class Tied(MLP):
    """One weight at both ends and in the middle, directly and transposed."""

    def forward(self, tasks):
        tied = self.layers[0].weight
        h = self.x @ tied
        for n, layer in enumerate(self.layers[1:]):
            h = layer(h).tanh()
            if n == 2:
                h = h * tied.mean(dim=0) + self.layers[0].bias
        return losses_of(h @ tied.T, tasks)


class SharedBias(MLP):
    """A learned tensor, itself computed, that is broadcast into every layer: as relative positions are."""

    def forward(self, tasks):
        bias = self.layers[0].bias.sigmoid()
        h = self.x
        for layer in self.layers[1:]:
            h = (layer(h) + bias).tanh() * bias[0]
        return losses_of(h, tasks)


class InPlace(MLP):
    """Views that are written to, and activations that are changed in place."""

    def forward(self, tasks):
        h = self.x
        for layer in self.layers:
            h = layer(h)
            h[:, 1:3].mul_(2.0)
            h = torch.relu_(h)
            left, right = h.split(WIDTH // 2, dim=1)
            h = torch.cat([right, left], dim=1)
        return losses_of(h, tasks)


class Conv(Model):
    def __init__(self):
        super().__init__()
        self.x = torch.randn(2, 4, 5, 5)
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.to(memory_format=torch.channels_last)

    def forward(self, tasks):
        h = self.x.contiguous(memory_format=torch.channels_last)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + norm(layer(h)).relu()
        return losses_of(h, tasks)


class LanguageModel(Model):
    """Embedding tied to the output, pre-norm attention, a classification loss a task."""

    def __init__(self, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(layers)
        )

    def forward(self, tasks):
        draw = torch.Generator().manual_seed(3)
        h = self.embedding(torch.randint(0, 11, (3, 5), generator=draw))
        for layer in self.layers:
            h = layer(h)
        logits = (h @ self.embedding.weight.T).flatten(0, 1)
        return [cross_entropy(logits, torch.randint(0, 11, (15,), generator=draw)) for _ in range(tasks)]


class EncoderDecoder(Model):
    """Every layer of the decoder attends to what the encoder gave."""

    def __init__(self):
        super().__init__()
        self.x = torch.randn(2, 3, 8)
        self.net = nn.Transformer(8, 2, 2, 3, 16, dropout=0.0, batch_first=True)

    def forward(self, tasks):
        return losses_of(self.net(self.x, self.x.flip(1)), tasks)


class Checkpointed(MLP):
    """Blocks of two layers are recomputed in the backward pass."""

    def forward(self, tasks):
        h = self.x
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            h = h + checkpoint(lambda z, f=first, s=second: s(f(z).tanh()).tanh(), h, use_reentrant=False)
        return losses_of(h, tasks)


class Scaled(torch.autograd.Function):
    """Twice the sum of two tensors: a node that Python runs."""

    @staticmethod
    def forward(ctx, a, b):
        return 2 * (a + b)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, 2 * grad


class Custom(MLP):
    """Residual connections that are nodes of Python's."""

    def forward(self, tasks):
        h = self.x
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            h = Scaled.apply(h, second(first(h).relu())) / 3
        return losses_of(h, tasks)


class Indexed(torch.autograd.Function):
    """Two outputs, of which one has no gradient."""

    @staticmethod
    def forward(ctx, a):
        index = a.argsort(dim=1)
        ctx.mark_non_differentiable(index)
        return index, a.clone()

    @staticmethod
    def backward(ctx, _, grad):
        return grad


class SeveralOutputs(MLP):
    """Nodes with several outputs, of which some are not used or have no gradient."""

    def forward(self, tasks):
        h = self.x
        for n, layer in enumerate(self.layers):
            h = layer(h).tanh()
            if n == 1:
                values, index = h.sort(dim=1)
                h = h + values * index
            elif n == 2:
                index, same = Indexed.apply(h)
                h = h + same.gather(1, index)
            elif n == 3:
                first, _, last = h.chunk(3, dim=1)
                h = torch.cat([first, last, last], dim=1) + h.max(dim=1, keepdim=True).values
        return losses_of(h, tasks)


class SeveralGraphs(MLP):
    """Losses of graphs that have nothing in common but parameters, one that is a parameter, and one twice."""

    def __init__(self):
        super().__init__()
        self.alone = nn.Parameter(torch.ones(()))

    def forward(self, tasks):
        whole = super().forward(tasks)
        first = self.layers[0](self.x).square().mean()
        return [whole[0], self.alone, first, first, whole[-1] * self.alone][:tasks]


MODELS = (
    MLP,
    Heads,
    HeadsInThreads,
    Residual,
    LongSkips,
    Dense,
    Tied,
    SharedBias,
    InPlace,
    Conv,
    LanguageModel,
    EncoderDecoder,
    Checkpointed,
    Custom,
    SeveralOutputs,
    SeveralGraphs,
)
