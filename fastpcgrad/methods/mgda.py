"""MGDA: the shortest convex combination of the task gradients."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from ._compiled import CompiledMethod
from ._count import count
from .solvers import simplex
from .solvers.problems import Array, CompiledSolver, Indices

Solver = Literal["frank-wolfe", "exact"]


class MGDA(CompiledMethod):
    """Weights on the simplex that make the merged gradient short: min αᵀGα with α ≥ 0, Σα = 1.

    At the minimum the merged gradient d has g_i·d ≥ ‖d‖² for every task: a common descent direction, or zero at a
    Pareto-stationary point. The weights do not change with the scale of the gradients.

    Args:
        epsilon: Frank-Wolfe stops when the step size falls below it; positive.
        max_iters: the most steps of Frank-Wolfe; positive.
        solver: ``frank-wolfe``, as published: it starts at 1/T, is exact after one step for T = 2, and for more tasks
            stops short of the minimum, whose conditions it approaches as slowly as 1/steps. ``exact``: the minimum up
            to rounding, in time that grows with T instead; where several weights give it, any.
    Raises:
        ValueError: ``epsilon`` or ``max_iters`` is not positive; unknown ``solver``.
    Numerics: float64, see ``_compiled.CompiledMethod``; ``exact``: see ``simplex.minimum``.
    Source: Désidéri 2012, doi:10.1016/j.crma.2012.03.014; Sener and Koltun 2018, arXiv:1810.04650, Alg. 2.
        ``exact``: Wolfe 1976, doi:10.1007/BF01580381. Oracles: ``reference.frank_wolfe``, ``reference.mgda``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.MGDA().weights(G)
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100, solver: Solver = "frank-wolfe") -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive; found {epsilon!r}")
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}; found {solver!r}")
        self.epsilon = epsilon
        self.max_iters = count("max_iters", max_iters, 1)
        self.solver = solver

    def compiled_solver(self) -> CompiledSolver:
        if self.solver == "exact":
            return CompiledSolver("shortest_point")
        return CompiledSolver("frank_wolfe", (self.epsilon, float(self.max_iters)))

    def solve_on_host(self, gram: Array) -> Array:
        if self.solver == "exact":
            slopes = np.zeros(gram.shape[1])
            found = [simplex.minimum(problem / (problem.trace() or 1.0), slopes, 1.0) for problem in gram]
            return np.array(found).reshape(gram.shape[:2])
        return self._frank_wolfe(gram)

    def _frank_wolfe(self, gram: Array) -> Array:
        count, tasks, _ = gram.shape
        problem = np.arange(count)
        weights = np.full((count, tasks), 1 / tasks)
        moving = np.ones(count, dtype=bool)
        for _ in range(self.max_iters):
            products = np.matmul(gram, weights[:, :, None])[:, :, 0]
            task = products.argmin(axis=1)
            step = np.where(moving, _line_search(gram, weights, products, problem, task), 0.0)
            weights *= 1 - step[:, None]
            weights[problem, task] += step
            moving &= step >= self.epsilon
            if not moving.any():
                break
        return weights

    def __repr__(self) -> str:
        return f"MGDA(epsilon={self.epsilon!r}, max_iters={self.max_iters!r}, solver={self.solver!r})"


def _line_search(gram: Array, weights: Array, products: Array, problem: Indices, task: Indices) -> Array:
    """γ ``[S]`` in [0, 1]: the minimum of ‖(1 − γ) d + γ g_t‖."""
    mixed = products[problem, task]
    current = (weights * products).sum(axis=1)
    corner = gram[problem, task, task]
    inside = (mixed < corner) & (mixed < current)
    # With mixed below both others the denominator is positive; elsewhere the minimum lies at an end: the nearer one, so
    # that the search stops, where both are the same point.
    denominator = np.where(inside, current + corner - 2 * mixed, 1.0)
    return np.where(inside, (current - mixed) / denominator, mixed < current)
