"""GradDrop: each column keeps the gradients of one sign, drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._task_vector import TaskVector, check_length, shown, task_vector
from .elementwise import Elementwise
from .fixed_weights import check_generator


def identity(purity: Tensor) -> Tensor:
    """f(P) = P."""
    return purity


class GradDrop(Elementwise):
    """In each column draw U ~ U[0, 1): the sum of the positive entries where f(P) > U, else of the negative.

    P = ½ (1 + Σ g / Σ |g|) is the column's positive sign purity. Without leak and with f the identity, the expected
    result has the sign of Σ g.

    Args:
        f: what is made of P, a tensor in [0, 1], elementwise and increasing.
        leak: of each task, ``[T]`` in [0, 1], the part of its gradient that is always kept; None: 0.
        generator: where U is drawn, on its device, one number a column in the order of the columns: fp32, for fp64 rows
            fp64. None: the global generator of the device of the rows.
    Raises:
        TypeError, ValueError: a bad argument; when merging, a number of tasks that does not fit.
    Numerics: see ``Elementwise.aggregate``. A column of zeros gives 0.
    Source: Chen et al. 2020, Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout,
        arXiv:2010.06808, Alg. 1, lines 10 to 15 (on the gradients of the parameters).
    Example:
        >>> J = torch.tensor([[1.0, 2.0, -1.0], [3.0, 0.0, -1.0]])
        >>> fastpcgrad.methods.GradDrop().aggregate(J)
        tensor([ 4.,  2., -2.])
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor] = identity,
        leak: TaskVector | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f must be a function of a tensor; found {f!r}")
        self.leak = None if leak is None else task_vector("leak", leak)
        if self.leak is not None and not ((self.leak >= 0) & (self.leak <= 1)).all():
            raise ValueError(f"leak must lie in [0, 1]; found {self.leak.tolist()}")
        check_generator(generator)
        self.f, self.generator = f, generator

    def check_tasks(self, tasks: int) -> None:
        if self.leak is not None:
            check_length("leak", self.leak, tasks)

    def columns(self, columns: Tensor) -> Tensor:
        above, below = columns.clamp_min(0), columns.clamp_max(0)
        positive, negative = above.sum(dim=0), below.sum(dim=0)
        # ½ (1 + Σ g / Σ |g|) is the share of the positive entries
        total = positive - negative
        purity = positive / torch.where(total == 0, 1.0, total)
        device = columns.device if self.generator is None else self.generator.device
        drawn = torch.rand(columns.shape[1], generator=self.generator, dtype=columns.dtype, device=device)
        keep_positive = self.f(purity) > drawn.to(columns.device)
        if self.leak is None:
            merged = torch.where(keep_positive, positive, negative)
        else:
            leak = self.leak.to(columns)[:, None]
            merged = (torch.where(keep_positive, above, below) * (1 - leak) + columns * leak).sum(dim=0)
        # The sign that was dropped must not take inf with it.
        return merged.add_(total, alpha=0)

    def __repr__(self) -> str:
        name = getattr(self.f, "__name__", repr(self.f))
        return f"GradDrop(f={name}, leak={shown(self.leak)}, generator={self.generator})"
