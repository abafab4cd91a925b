"""MGDA: the shortest convex combination of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._ops import to_device
from ._compiled import CompiledMethod
from ._count import count
from ._task_numbers import places
from .base import Solution
from .solvers import simplex
from .solvers.problems import Array, CompiledSolver, Indices, check_gram

Solver = Literal["frank-wolfe", "exact"]
Normalization = Literal["none", "l2", "loss", "loss+"]


class MGDA(CompiledMethod):
    """Weights on the simplex that make the merged gradient short: min αᵀGα with α ≥ 0, Σα = 1.

    At the minimum the merged gradient d has g_i·d ≥ ‖d‖² for every task: a common descent direction, or zero at a
    Pareto-stationary point. The weights do not change with the scale of the gradients, but for ``normalization``.

    Args:
        epsilon: Frank-Wolfe stops when the step size falls below it; positive.
        max_iters: the most steps of Frank-Wolfe; positive.
        solver: ``frank-wolfe``, as published: it starts at 1/T, is exact after one step for T = 2, and for more tasks
            stops short of the minimum, whose conditions it approaches as slowly as 1/steps. ``exact``: the minimum up
            to rounding, in time that grows with T instead; where several weights give it, any.
        normalization: what each task gradient is divided by, in the minimum and in the answer alike, as in the authors'
            code and LibMTL: ``none``; ``l2``, its norm; ``loss``, its loss; ``loss+``, both. With ``l2`` the length of
            the answer says how much the directions agree, with ``loss+`` that over the losses: unscale losses that are
            scaled for mixed precision before, not after.
    Attributes:
        losses: ``loss`` and ``loss+`` need the losses of the step, which G does not hold: set them before each merge,
            ``method.losses = losses``, one for each task by its index, > 0, None for an absent one. They serve once.
            Of several processes those of the first count: average them, as for a log.
    Raises:
        ValueError: ``epsilon`` or ``max_iters`` is not positive; unknown ``solver`` or ``normalization``; losses that
            are not > 0, or set where they are not needed. From ``solve``: losses that are needed and were not set.
    Numerics: float64, see ``_compiled.CompiledMethod``; ``exact``: see ``simplex.minimum``.
    Source: Désidéri 2012, doi:10.1016/j.crma.2012.03.014; Sener and Koltun 2018, arXiv:1810.04650, Alg. 2.
        ``exact``: Wolfe 1976, doi:10.1007/BF01580381. Oracles: ``reference.frank_wolfe``, ``reference.mgda``, of
        ``reference.normalized``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.MGDA().weights(G)
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    def __init__(
        self,
        epsilon: float = 0.001,
        max_iters: int = 100,
        solver: Solver = "frank-wolfe",
        normalization: Normalization = "none",
    ) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive; found {epsilon!r}")
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}; found {solver!r}")
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"normalization must be one of {', '.join(get_args(Normalization))}; found {normalization!r}"
            )
        self.epsilon = epsilon
        self.max_iters = count("max_iters", max_iters, 1)
        self.solver = solver
        self.normalization = normalization
        self._losses: Tensor | None = None

    @property
    def losses(self) -> Tensor | None:
        return self._losses

    @losses.setter
    def losses(self, losses: Sequence[Tensor | float | None] | Tensor) -> None:
        if self.normalization not in ("loss", "loss+"):
            raise ValueError(f"losses serve normalization 'loss' and 'loss+'; found {self.normalization!r}")
        values = [torch.nan if loss is None else loss for loss in losses]
        found = torch.stack([torch.as_tensor(value).detach().double().reshape(()) for value in values])
        if found.is_cpu and (found <= 0).any():
            raise ValueError(f"losses must be > 0 for normalization {self.normalization!r}; found {found.tolist()}")
        self._losses = found.where(found.isfinite() & (found > 0), torch.nan)

    def solve(self, gram: Tensor) -> Solution:
        return self.solve_for(gram, range(check_gram(gram)[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        if self.normalization == "none":
            return super().solve(gram)
        check_gram(gram)
        scales = self._scales(gram, tasks)
        weights = super().solve(gram * scales[..., :, None] * scales[..., None, :]).weights
        return Solution(weights * scales, None)

    def _scales(self, gram: Tensor, tasks: Sequence[int]) -> Tensor:
        """What each task gradient is multiplied by, ``[T]`` or ``[S, T]``; 0 for one of zeros."""
        scales = torch.ones_like(gram[..., 0])
        if self.normalization != "loss":
            norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
            scales = torch.where(norms == 0, 0.0, 1 / norms)
        if self.normalization == "l2":
            return scales
        losses, self._losses = self._losses, None
        if losses is None or len(losses) <= max(tasks, default=-1):
            found = "none" if losses is None else f"those of {len(losses)} tasks"
            raise ValueError(
                f"normalization {self.normalization!r} divides by the losses of tasks {list(tasks)}: set method.losses "
                f"before each merge; found {found}"
            )
        return scales / to_device(losses, gram.device)[places(tasks, gram.device)]

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
        return (
            f"MGDA(epsilon={self.epsilon!r}, max_iters={self.max_iters!r}, solver={self.solver!r}, "
            f"normalization={self.normalization!r})"
        )


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
