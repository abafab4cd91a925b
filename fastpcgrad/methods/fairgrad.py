"""FairGrad: the α-fair division of the progress among the tasks."""

from __future__ import annotations

import numpy as np

from ._compiled import CompiledMethod
from ._count import count
from .solvers import fairness
from .solvers.problems import Array, CompiledSolver


class FairGrad(CompiledMethod):
    """Weights w > 0 with G w = w^(−1/α): the α-fair share of the progress for each task.

    α = 0 is linear scalarisation (weights 1/T), α = 1 proportional fairness (Nash-MTL without its normalisation),
    α → ∞ max-min fairness. Gradients k times as long give weights k^(−2α/(1+α)) times as large, as in the paper: the
    merged gradient is scale-equivariant for α = 0 alone, and for α = 1 its length does not depend on the scale.

    Args:
        alpha: which fairness; not negative. LibMTL takes 1.
        max_iters: the most Newton steps; positive. About 10 suffice where task gradients are not nearly dependent.
    Raises:
        ValueError: ``alpha`` is negative or not finite, or ``max_iters`` is not positive.
    Numerics: see ``fairness.solve``; a task without gradient gets weight 0, and at a Pareto-stationary point, where
        there is no solution, the weights are large but finite. float64, see
        ``_compiled.CompiledMethod``.
    Source: Ban and Ji 2024, Fair Resource Allocation in Multi-Task Learning, arXiv:2402.15638, eq. 4.
        Oracle: ``reference.fairgrad``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.FairGrad(alpha=1.0).weights(G)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, alpha: float = 1.0, max_iters: int = 100) -> None:
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha must be finite and not negative; found {alpha!r}")
        self.alpha = alpha
        self.max_iters = count("max_iters", max_iters, 1)

    def compiled_solver(self) -> CompiledSolver | None:
        return fairness.solver(self.alpha, self.max_iters) if self.alpha else None

    def solve_on_host(self, gram: Array) -> Array:
        if self.alpha == 0:
            return np.full(gram.shape[:2], 1 / gram.shape[1])
        return fairness.solve(gram, self.alpha, self.max_iters)

    def __repr__(self) -> str:
        return f"FairGrad(alpha={self.alpha!r}, max_iters={self.max_iters!r})"
