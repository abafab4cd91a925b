"""What a method is that works on each column of J by itself and cannot be had from the Gram matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import KERNELS, Blocks, Figures, Later, flat
from .base import Method, Solution

# Entries of J that are worked on at a time: few enough for a CPU's cache, many enough to fill a GPU.
_CPU_ENTRIES = 1 << 18
_GPU_ENTRIES = 1 << 24


class Elementwise(Method):
    """A rule that merges each column of J by itself: it needs the rows, and has no weights.

    A subclass gives ``columns``; ``aggregate`` and ``merge`` call it on one range of columns after the other.
    """

    def aggregate(self, rows: Tensor) -> Tensor:
        """The merged gradient of packed task gradients.

        Args:
            rows: J, ``[T, n]`` fp16/bf16/fp32/fp64, any strides; not changed.
        Returns:
            ``[n]``, dtype and device of ``rows``.
        Raises:
            ValueError: a number of tasks that does not fit.
        Numerics: in fp32 for fp16/bf16 rows, else in the dtype of the rows. What is not finite in any row makes its
            column of the result not finite.
        Memory: besides the result a small multiple of 2¹⁸ numbers on a CPU and of 2²⁴ on a GPU, whatever n is.
        """
        self.check_tasks(len(rows))
        out = rows.new_empty(rows.shape[1])
        self._aggregate(list(rows), out)
        return out

    def merge(self, blocks: Blocks, out: Sequence[Tensor | None], tasks: Sequence[int]) -> Later:
        """See ``Method.merge``. A task without a gradient of a parameter counts as zero there; the weights are NaN."""
        self.check_tasks(len(tasks))
        gram: Tensor = KERNELS["gram_blocks"](blocks, None, 1)[0]
        for place, column in zip(out, zip(*blocks.tensors, strict=True), strict=True):
            if place is not None:
                self._aggregate([None if grad is None else flat(grad) for grad in column], flat(place))
        return lambda: Figures(gram, gram.new_full((len(tasks),), torch.nan))

    def _aggregate(self, rows: Sequence[Tensor | None], out: Tensor) -> None:
        """The merged gradient of rows ``[n]``, None for one of zeros, into ``out``, which may be one of them."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        step = max(1, (_CPU_ENTRIES if out.is_cpu else _GPU_ENTRIES) // len(rows))
        for start in range(0, len(out), step):
            place = out[start : start + step]
            chunk = torch.zeros((len(rows), len(place)), dtype=dtype, device=out.device)
            for columns, row in zip(chunk, rows, strict=True):
                if row is not None:
                    columns.copy_(row[start : start + step])
            place.copy_(self.columns(chunk))

    @abstractmethod
    def columns(self, columns: Tensor) -> Tensor:
        """The merged gradient ``[m]`` of some columns ``[T, m]``, fp32 or fp64; must not change them."""

    def check_tasks(self, tasks: int) -> None:
        """ValueError where the method cannot work on that many task gradients."""

    def solve(self, gram: Tensor) -> Solution:
        raise TypeError(f"{type(self).__name__} needs the task gradients themselves, which G does not hold")
