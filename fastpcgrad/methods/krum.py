"""Krum: the task gradients that lie nearest to their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from ._count import count
from .base import Method, Solution
from .solvers.problems import check_gram


class Krum(Method):
    """The mean of the ``n_selected`` task gradients with the lowest scores (Multi-Krum; Krum selects one).

    The score of a task gradient is the sum of its distances to the T − n_byzantine − 2 others nearest to it.

    Args:
        n_byzantine: f, how many of the task gradients may be arbitrary. Needs T ≥ f + 3; the paper's guarantee holds
            for T ≥ 2 f + 3.
        n_selected: how many are averaged, at most T.
        squared: sum squared distances, as the paper does, instead of distances, as TorchJD does.
    Raises:
        TypeError, ValueError: a bad count; when solving, too few tasks.
    Numerics: float64, no host sync. A distance comes from ‖a‖² + ‖b‖² − 2 a·b, so two gradients nearer than about 1e-8
        of their norms may count as equal. Of equal scores the first task is selected. A Gram matrix that is not
        finite gives NaN weights: a broken gradient must be seen, not voted out.
    Source: Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS.
        Oracle: ``reference.krum``.
    Example:
        >>> J = torch.tensor([[0.0], [1.0], [1.5], [9.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.Krum(n_byzantine=1, n_selected=2).weights(J @ J.T)
        tensor([0.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """

    def __init__(self, n_byzantine: int, n_selected: int = 1, squared: bool = False) -> None:
        self.n_byzantine = count("n_byzantine", n_byzantine, 0)
        self.n_selected = count("n_selected", n_selected, 1)
        if not isinstance(squared, bool):
            raise TypeError(f"squared must be a bool; found {squared!r}")
        self.squared = squared

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        tasks = gram.shape[-1]
        if tasks < max(self.n_byzantine + 3, self.n_selected):
            raise ValueError(
                f"Krum with n_byzantine={self.n_byzantine} and n_selected={self.n_selected} needs at least "
                f"{max(self.n_byzantine + 3, self.n_selected)} task gradients; found {tasks}"
            )
        norms = gram.diagonal(dim1=-2, dim2=-1)
        distances = (norms.unsqueeze(-1) + norms.unsqueeze(-2)).sub_(gram, alpha=2).clamp_min_(0)
        if not self.squared:
            distances.sqrt_()
        # The nearest of all is the task itself, at distance 0.
        scores = distances.topk(tasks - self.n_byzantine - 1, largest=False, sorted=False).values.sum(dim=-1)
        selected = scores.argsort(dim=-1, stable=True)[..., : self.n_selected]
        weights = torch.zeros_like(scores).scatter_(-1, selected, 1 / self.n_selected)
        # A sum over an entry that is not finite is not finite.
        return Solution(weights.add_(gram.sum(dim=(-2, -1)).unsqueeze(-1), alpha=0), None)

    def __repr__(self) -> str:
        return f"Krum(n_byzantine={self.n_byzantine}, n_selected={self.n_selected}, squared={self.squared})"
