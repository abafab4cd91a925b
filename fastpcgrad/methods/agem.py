"""A-GEM: what is learned now must not raise the loss on what was learned before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._main_task import check_main
from .base import Method, Solution
from .solvers.problems import check_gram


class AGEM(Method):
    """The gradient of task 0, made orthogonal to that of the others, a memory of earlier tasks, where it conflicts.

    d = g − (g·r / r·r) r where g·r < 0, else g, with g the gradient of task 0 and r the mean of all others: one of
    batches from the memory, or one for each earlier task. With two tasks it is ``DualProj(pref_vector=[1, 0],
    reg_eps=0)``. Where the others are absent, as in the first task of all, it is g. The weights do not change with the
    scale of the gradients.

    Raises:
        ValueError: when solving, task 0 is absent.
    Numerics: float64 on the device of G, where nothing waits. Where r is all but zero beside its parts it counts as
        zero: r·r below 16 T² eps of Σ_jk |g_j·g_k|, which is rounding.
    Source: Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM, arXiv:1812.00420, eq. 11.
        Oracle: ``reference.agem``.
    Example:
        >>> G = torch.tensor([[1.0, -2.0], [-2.0, 8.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.AGEM().weights(G)
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    def solve(self, gram: Tensor) -> Solution:
        return self.solve_for(gram, range(check_gram(gram)[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        check_gram(gram)
        check_main(self, "current task", tasks)
        others = gram[..., 1:, 1:]
        squared, size = others.sum(dim=(-2, -1)), others.abs().sum(dim=(-2, -1))
        there = squared > 16 * len(tasks) ** 2 * torch.finfo(torch.float64).eps * size
        factor = (-gram[..., 0, 1:].sum(dim=-1)).clamp_min(0) / torch.where(there, squared, torch.inf)
        weights = torch.cat(
            [torch.ones_like(gram[..., 0, :1]), factor[..., None].expand(gram[..., 0, 1:].shape)], dim=-1
        )
        # Infinite products would leave a weight of 0 or 1: what is not finite is to be seen.
        return Solution(weights + 0 * gram.sum(dim=(-2, -1))[..., None], None)

    def __repr__(self) -> str:
        return "AGEM()"
