"""What a method is that works on each column of J by itself and cannot be had from the Gram matrix."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import Method, Solution

# Entries of J that are worked on at a time: few enough for a CPU's cache, many enough to fill a GPU.
_CPU_ENTRIES = 1 << 18
_GPU_ENTRIES = 1 << 24


class Elementwise(Method):
    """A rule that merges each column of J by itself: it needs the rows, and has no weights.

    A subclass gives ``columns``; ``aggregate`` calls it on one range of columns after the other.
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
        tasks, width = rows.shape
        self.check_tasks(tasks)
        out = rows.new_empty(width)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        step = max(1, (_CPU_ENTRIES if rows.is_cpu else _GPU_ENTRIES) // tasks)
        for start in range(0, width, step):
            chunk = rows[:, start : start + step]
            out[start : start + step] = self.columns(chunk.to(dtype))
        return out

    @abstractmethod
    def columns(self, columns: Tensor) -> Tensor:
        """The merged gradient ``[m]`` of some columns ``[T, m]``, fp32 or fp64; must not change them."""

    def check_tasks(self, tasks: int) -> None:
        """ValueError where the method cannot work on that many task gradients."""

    def solve(self, gram: Tensor) -> Solution:
        raise TypeError(f"{type(self).__name__} needs the task gradients themselves, which G does not hold")
