"""Random models whose losses share a graph, made of what people build models of, and of what makes weights hard to
take for factors.

Each piece maps ``[B, S, WIDTH]`` to the same. ``Drawn`` chooses some, heads on them, and leaves that no surgery knows.
"""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Piece(nn.Module):
    """A linear layer, and whatever a subclass does with it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return self.linear(h).tanh()


class NoBias(Piece):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)


class Flat(Piece):
    def forward(self, h):
        return self.linear(h.flatten(0, 1)).relu().view_as(h)


class Residual(Piece):
    def forward(self, h):
        return h + self.linear(h).relu()


class InPlace(Piece):
    def forward(self, h):
        h = self.linear(h)
        return h.relu_()


class LayerNorm(Piece):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, h):
        return self.norm(self.linear(h))


class BatchNorm(Piece):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, h):
        return self.norm(self.linear(h).flatten(0, 1)).view_as(h)


class Convolution(Piece):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, h):
        return self.convolution(h.transpose(1, 2)).transpose(1, 2).tanh()


class Attention(Piece):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h):
        return h + self.attention(h, h, h)[0]


class Recurrent(Piece):
    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, h):
        return self.cells(h)[0]


class Cell(Piece):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, h):
        state, outputs = None, []
        for step in h.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, dim=1)


class Reused(Piece):
    def forward(self, h):
        for _ in range(3):
            h = self.linear(h).tanh()
        return linear(h, self.linear.weight)


class BothWays(Piece):
    """As it is and transposed, as decoders tied to encoders are."""

    def forward(self, h):
        return (self.linear(h).tanh() @ self.linear.weight).tanh()


class Penalised(Piece):
    """The weight itself in a sum besides."""

    def forward(self, h):
        return self.linear(h).tanh() * (1 + self.linear.weight.square().mean())


class AsItIs(Piece):
    """``[in, out]``, as in GPT-2's Conv1D."""

    def forward(self, h):
        flat = torch.addmm(self.linear.bias, h.flatten(0, 1), self.linear.weight)
        return flat.tanh().view_as(h)


class Scaled(Piece):
    """A product with factors."""

    def forward(self, h):
        flat = torch.addmm(self.linear.bias, h.flatten(0, 1), self.linear.weight.t(), alpha=0.5, beta=3.0)
        return flat.tanh().view_as(h)


class LowRank(Piece):
    """LoRA: a frozen weight and a product of two thin ones."""

    def __init__(self):
        super().__init__()
        self.linear.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, h):
        return (self.linear(h) + self.up(self.down(h))).tanh()


class Frozen(Piece):
    def __init__(self):
        super().__init__()
        self.linear.weight.requires_grad_(False)


class WeightNorm(Piece):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(self.linear)


class HookedActivation(Piece):
    def forward(self, h):
        h = self.linear(h)
        h.register_hook(lambda grad: grad * 10)
        return h.tanh()


class Reversed(Piece):
    """The gradient changes its sign on the way, before and behind the layer."""

    def forward(self, h):
        if h.requires_grad:
            h.register_hook(lambda grad: -grad)
        out = self.linear(h)
        out.grad_fn.register_prehook(lambda grads: (3 * grads[0],))
        return out


class HookedWeight(Piece):
    def __init__(self):
        super().__init__()
        self.linear.weight.register_hook(lambda grad: grad * 2)


class HookedView(Piece):
    def forward(self, h):
        view = self.linear.weight.t()
        view.register_hook(lambda grad: grad * 2)
        return (h.flatten(0, 1) @ view).tanh().view_as(h)


class AfterAccumulation(Piece):
    def __init__(self):
        super().__init__()
        self.linear.weight.register_post_accumulate_grad_hook(self.double_gradient)

    @staticmethod
    def double_gradient(weight):
        weight.grad.mul_(2)


class Retained(Piece):
    def forward(self, h):
        h = self.linear(h)
        h.retain_grad()
        return h.tanh()


class Checkpointed(Piece):
    def forward(self, h):
        return checkpoint(super().forward, h, use_reentrant=False)


class Packed(Piece):
    """Saved tensors go elsewhere and come back, as with offloading."""

    def forward(self, h):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            return super().forward(h)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return 2 * h

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Custom(Piece):
    def forward(self, h):
        return Twice.apply(self.linear(h)).tanh()


class Embedded(Piece):
    """Looked up by indices, and used as an output layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, h):
        index = torch.arange(h.shape[1]) % 5
        h = self.linear(h + self.table(index))
        return (h @ self.table.weight.T).tanh() @ self.table.weight


class LookedUp(Piece):
    """By indices of several shapes that repeat, some of which are padding."""

    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(7, WIDTH, padding_idx=2, **options)

    def forward(self, h):
        index = torch.arange(h.shape[0] * h.shape[1]).view(h.shape[:2]) % 5
        return self.linear(h + self.table(index)).tanh() + self.table(index[0]) + self.table(index[0, 0])


class Renormalised(LookedUp):
    def __init__(self):
        super().__init__(max_norm=0.5)


class ByFrequency(LookedUp):
    def __init__(self):
        super().__init__(scale_grad_by_freq=True)


class FrozenTable(LookedUp):
    def __init__(self):
        super().__init__()
        self.table.requires_grad_(False)


class Bags(Piece):
    """Means of lookups, of which one is empty, beside what was looked up alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(7, WIDTH, mode="mean")

    def forward(self, h):
        index, ends = torch.arange(7).repeat(h.shape[1])[: 2 * h.shape[1]], 2 * torch.arange(h.shape[1])
        return self.linear(h + self.table(index % 5, ends)).tanh() + self.table(index, ends.clamp(min=1) - 1)


class HookedTable(LookedUp):
    def __init__(self):
        super().__init__()
        self.table.weight.register_hook(lambda grad: grad * 2)


class HookedLookup(Piece):
    """The gradient changes between the losses and the table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, h):
        found = self.table(torch.arange(h.shape[1]) % 3)
        found.register_hook(lambda grad: -3 * grad)
        return self.linear(h + found)


PIECES = tuple(kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, Piece))


class Drawn(nn.Module):
    """Some pieces one after the other, a head for each task at some depth, and a learned scale that is no parameter of
    the surgery.

    Args:
        draw: what decides.
        kinds: of the pieces; None: some of all.
    """

    def __init__(self, draw: random.Random, tasks: int, kinds=None):
        super().__init__()
        kinds = kinds or draw.choices(PIECES, k=draw.randint(1, 4))
        self.pieces = nn.ModuleList(kind() for kind in kinds)
        self.depths = [draw.choice([len(kinds), len(kinds), draw.randint(1, len(kinds))]) for _ in range(tasks)]
        self.heads = nn.ModuleList(nn.Linear(WIDTH, draw.randint(1, 3)) for _ in range(tasks))
        self.outside, self.is_above = nn.Parameter(torch.ones(WIDTH)), draw.random() < 0.8
        self.shape = (draw.randint(2, 4), draw.randint(1, 3), WIDTH)

    def of_surgery(self):
        """The parameters that a surgery takes."""
        return [p for p in self.parameters() if p is not self.outside and p.requires_grad]

    def forward(self, x):
        """A loss for each task."""
        below, above = (1, self.outside) if self.is_above else (self.outside, 1)
        seen = [x * below]
        for piece in self.pieces:
            seen.append(piece(seen[-1]))
        outputs = [head(seen[depth] * above) for head, depth in zip(self.heads, self.depths, strict=True)]
        return [(out - n).square().mean() for n, out in enumerate(outputs)]
