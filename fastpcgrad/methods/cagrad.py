"""CAGrad: the direction near the mean gradient that improves the worst-off task most."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .._named import named
from ._compiled import CompiledMethod
from .base import Solution
from .solvers import simplex
from .solvers.problems import Array, CompiledSolver

_DIVISORS = {"paper": lambda c: 1.0, "cagrad": lambda c: 1 + c * c, "cagrad-toy": lambda c: 1 + c}
"""What the published codes divide the answer by."""


class CAGrad(CompiledMethod):
    """Weights of the d that maximises min_i g_i·d within ‖d − g_0‖ ≤ c‖g_0‖, where g_0 is the mean gradient.

    w = 1/T + (c‖g_0‖/‖g_v‖) v, where v minimises g_v·g_0 + c‖g_0‖‖g_v‖ over the simplex, g_v = v J. With c = 0 it is
    the mean. The weights do not change with the scale of the gradients, so the merged gradient scales with them.

    Args:
        c: radius of the ball around g_0 in units of ‖g_0‖; not negative. The paper takes 0.2 to 0.8, LibMTL
            0.5.
        norm_eps: zero weights where ‖g_v‖ < norm_eps·‖J‖_F: the point is about Pareto-stationary; not negative. TorchJD
            also gives zeros where ‖J‖_F² < norm_eps, which would stop the training on small or scaled gradients.
        variant: ``paper``: as above, as TorchJD too. ``cagrad``: divided by 1 + c², as the authors' experiments,
            LibMTL's ``rescale=1`` and what follows them. ``cagrad-toy``: by 1 + c, as the authors' toy problem,
            LibMTL's ``rescale=2``.
    Raises:
        ValueError: an argument is negative or not finite; unknown variant.
    Numerics: see ``simplex.minimum``: exact up to rounding while ‖g_v‖ is not tiny. float64,
        see ``_compiled.CompiledMethod``.
    Source: Liu et al. 2021, Conflict-Averse Gradient Descent, arXiv:2110.14048, Alg. 1. Oracle: ``reference.cagrad``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.CAGrad(c=0.5).weights(G)
        tensor([1.0590, 0.5000], dtype=torch.float64)
    """

    def __init__(self, c: float = 0.5, norm_eps: float = 0.0001, variant: str = "paper") -> None:
        if not 0 <= c < np.inf:
            raise ValueError(f"c must be finite and not negative; found {c!r}")
        if not 0 <= norm_eps < np.inf:
            raise ValueError(f"norm_eps must be finite and not negative; found {norm_eps!r}")
        self.c = c
        self.norm_eps = norm_eps
        self.variant = variant
        self._divisor = named("variant", variant, _DIVISORS)(c)

    def solve(self, gram: Tensor) -> Solution:
        weights = super().solve(gram).weights
        return Solution(weights if self._divisor == 1 else weights / self._divisor, None)

    def compiled_solver(self) -> CompiledSolver:
        return CompiledSolver("conflict_averse", (self.c, self.norm_eps))

    def solve_on_host(self, gram: Array) -> Array:
        return np.array([self._solve_one(problem) for problem in gram]).reshape(gram.shape[:2])

    def _solve_one(self, gram: Array) -> Array:
        tasks = len(gram)
        mean = np.full(tasks, 1 / tasks)
        if self.c == 0:
            return mean
        gram = gram / (gram.trace() or 1.0)
        products = gram.mean(axis=1)  # g_i·g_0
        radius = self.c * np.sqrt(max(float(products.mean()), 0.0))
        if radius == 0:
            return np.zeros(tasks)
        v = simplex.minimum(gram, products, radius)
        norm = np.sqrt(max(float(v @ gram @ v), 0.0))
        if norm < max(self.norm_eps, simplex.SMOOTHING):
            return np.zeros(tasks)
        return mean + radius / norm * v

    def __repr__(self) -> str:
        return f"CAGrad(c={self.c!r}, norm_eps={self.norm_eps!r}, variant={self.variant!r})"
