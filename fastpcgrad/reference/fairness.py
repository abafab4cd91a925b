"""FairGrad and Nash-MTL: G w = w^(−1/α) with w > 0, by Newton's method with short steps."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 20_000
_LOST = 1e-13
"""Square of ‖y U‖/‖y‖ below which y is taken to grow without bound, towards combinations of unit gradients to zero."""


def fairgrad(rows: Tensor, alpha: float) -> Tensor:
    """FairGrad, arXiv:2402.15638, eq. 4: weights ``[T]`` with g_t·d = w_t^(−1/α), d = w J; 1/T each for α = 0.

    With y_t = ‖g_t‖w_t and unit gradients u_t: u_t·(y U) = s_t(y), s_t = (‖g_t‖/y_t)^p/‖g_t‖, p = 1/α. Its y minimises
    a convex function, ½‖y U‖² and a barrier of each y_t whose second derivative changes by at most a factor of e while
    y_t changes by a fraction 1/(p + 1). So Newton's steps, shortened to stay about within that, always go down and end
    up whole. A zero gradient has no part in it and weight 0.

    Raises:
        ArithmeticError: the equation does not hold in the end: there is no solution, as where a convex combination of
            the task gradients is zero.
    """
    if alpha == 0:
        return torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    gradients, power = rows.double(), 1 / alpha
    norms = gradients.norm(dim=1)
    there = norms > 0
    weights = torch.zeros_like(norms)
    if not there.any():
        return weights
    lengths = norms[there]
    units = gradients[there] / lengths[:, None]

    def shares(y: Tensor) -> Tensor:
        return ((lengths / y).log() * power - lengths.log()).exp()

    y = lengths ** ((1 - alpha) / (1 + alpha))  # the solution for orthogonal gradients
    largest = torch.inf
    for _ in range(_STEPS):
        wanted = shares(y)
        if y @ wanted < _LOST * (y @ y):
            raise ArithmeticError("there are no weights w > 0 with G w = w^(-1/alpha): they grow without bound")
        # (U Uᵀ + D) δ = s − U Uᵀ y with D = p s/y, by the least squares problem of which these are the normal
        # equations, for δ in units of y.
        roots = (power * wanted / y).sqrt()
        system = torch.cat([units.mT * y, torch.diag(roots * y)])
        relative = _least_squares(system, torch.cat([-(y @ units), wanted / roots]))
        before, largest = largest, float(relative.abs().max())
        if largest >= before and largest < 1e-3:  # nothing but rounding is left
            break
        y = y * (1 + relative / (1 + (power + 1) * largest))
    else:
        raise ArithmeticError(f"after {_STEPS} steps the weights still change by a fraction {largest:.1e}")
    weights[there] = y / lengths
    return weights


def _least_squares(system: Tensor, sides: Tensor) -> Tensor:
    scales = system.norm(dim=0)
    q, r = torch.linalg.qr(system / scales)
    return torch.linalg.solve_triangular(r, (q.mT @ sides)[:, None], upper=True)[:, 0] / scales


def nash_mtl(rows: Tensor, max_norm: float = 1.0, known: Tensor | None = None) -> Tensor:
    """Nash-MTL, arXiv:2202.01017, Alg. 1: G w = 1/w; then w J shortened to ``max_norm`` (0: not).

    Args:
        known: the weights of an earlier call (before the shortening), which are used again; None: found anew.
    Raises:
        ArithmeticError: see ``fairgrad``.
    """
    weights = fairgrad(rows, 1.0) if known is None else known
    norm = (weights @ rows.double()).norm()
    return weights * (max_norm / norm) if norm > max_norm > 0 else weights
