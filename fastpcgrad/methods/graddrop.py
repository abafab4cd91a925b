"""GradDrop: each column keeps the gradients of one sign, drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import kernels
from ._task_vector import TaskVector, check_length, shown, task_vector
from .elementwise import Elementwise
from .fixed_weights import check_generator

_CPU_COLUMNS = 1 << 17
_GPU_COLUMNS = 1 << 22
"""Columns at a time: on a CPU what half a dozen vectors of stay in its cache."""


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
        arXiv:2010.06808, Alg. 1, lines 10 to 15 (on the gradients of the parameters). Oracle: ``reference.graddrop``.
    Example:
        >>> J = torch.tensor([[1.0, 2.0, -1.0], [3.0, 0.0, -1.0]])
        >>> fastpcgrad.methods.GradDrop().aggregate(J)
        tensor([ 4.,  2., -2.])
    """

    generator: torch.Generator | None
    draws = True

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

    def merge_rows(self, rows: Sequence[Tensor | None], out: Tensor) -> None:
        step = _CPU_COLUMNS if out.is_cpu else _GPU_COLUMNS
        for start in range(0, len(out), step):
            place = out[start : start + step]
            place.copy_(self._merged([None if row is None else row[start : start + step] for row in rows], place))

    def _merged(self, rows: Sequence[Tensor | None], like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        sums = like.new_empty((2, len(like)), dtype=dtype)
        kernels.sign_sums(rows, None, sums)
        positive, negative = sums
        # ½ (1 + Σ g / Σ |g|) is the share of the positive entries; that of a column of zeros is 0 / 0.
        total = positive - negative
        purity = (positive / total).nan_to_num_(nan=0.0)
        device = like.device if self.generator is None else self.generator.device
        drawn = torch.rand(len(like), generator=self.generator, dtype=dtype, device=device).to(like.device)
        # 0 or 1, as numbers: lerp is exact at both ends, and takes a tenth of the time of torch.where.
        keep_positive = torch.lt(drawn, self.f(purity), out=drawn)
        if self.leak is None:
            merged = torch.lerp(negative, positive, keep_positive)
        else:
            kernels.sign_sums(rows, [1 - leak for leak in self.leak.tolist()], sums)
            merged = torch.lerp(negative, positive, keep_positive)
            kernels.sign_sums(rows, self.leak.tolist(), sums)
            merged += positive + negative
        # The sign that was dropped must not take inf with it.
        return merged.add_(total, alpha=0)

    def __repr__(self) -> str:
        name = getattr(self.f, "__name__", repr(self.f))
        return f"GradDrop(f={name}, leak={shown(self.leak)}, generator={self.generator})"
