"""What a method is that works on each column of J by itself and cannot be had from the Gram matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .._derivatives import refuse_derivative
from .base import Method, Solution

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Elementwise(Method):
    """A rule that merges each column of J by itself: it needs the rows, and has no weights.

    A subclass gives ``merge_rows``.
    """

    needs_rows = True
    draws: bool = False
    """Whether it draws from its generator."""

    def aggregate(self, rows: Tensor) -> Tensor:
        """The merged gradient of packed task gradients.

        Args:
            rows: J, ``[T, n]`` fp16/bf16/fp32/fp64, any strides; not changed.
        Returns:
            ``[n]``, dtype and device of ``rows``.
        Raises:
            TypeError: rows of another dtype.
            ValueError: not two dimensions, no rows, a number of tasks that does not fit.
            RuntimeError: ``rows`` are differentiated in forward mode or by a transform of ``torch.func``.
        Numerics: in fp32 for fp16/bf16 rows, else in the dtype of the rows. What is not finite in any row makes its
            column of the result not finite.
        Memory: besides the result some 2²⁰ numbers on a CPU and 2²⁵ on a GPU, whatever n is.
        """
        if rows.dim() != 2 or not len(rows):
            raise ValueError(f"rows must be [T, n] with T >= 1; found {list(rows.shape)}")
        if rows.dtype not in _DTYPES:
            raise TypeError(f"rows must be fp16, bf16, fp32 or fp64; found {rows.dtype}")
        self.check_tasks(len(rows))
        refuse_derivative(f"{type(self).__name__}.aggregate", rows)
        out = rows.new_empty(rows.shape[1])
        self.merge_rows(list(rows.detach()), out)
        return out

    @abstractmethod
    def merge_rows(self, rows: Sequence[Tensor | None], out: Tensor) -> None:
        """The merged gradient of rows ``[n]``, None for one of zeros, into ``out``, which may be one of them."""

    def check_tasks(self, tasks: int) -> None:
        """ValueError where the method cannot work on that many task gradients."""

    def solve(self, gram: Tensor) -> Solution:
        raise TypeError(f"{type(self).__name__} needs the task gradients themselves, which G does not hold")
