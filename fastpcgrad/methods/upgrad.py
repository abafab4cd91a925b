"""UPGrad: each task gradient is projected onto the dual cone of all of them."""

from __future__ import annotations

from torch import Tensor

from ._dual_cone import DualConeMethod
from .base import Solution


class UPGrad(DualConeMethod):
    """Replace each task gradient by the nearest vector that conflicts with no task, then combine by preference.

    No task is harmed with ``reg_eps=0``. Else g_t·d ≥ −reg_eps·‖J‖_F²·w_t: one with a short gradient beside long ones
    can be, a little.

    Args:
        pref_vector: preference of each task, ``[T]``; None: 1/T each.
        norm_eps: a Gram matrix whose trace is not above it counts as zero: the answer is then the combination by
            preference alone. 0 by default, so that the answer scales with the gradients; TorchJD has 1e-4.
        reg_eps: added to the diagonal of G / tr G, as TorchJD does. It keeps the weights small where task
            gradients depend on each other, and lets a conflict of this relative size through. With 0 the
            projections are exact.
    Raises:
        TypeError, ValueError: a bad preference vector or eps; when solving, a number of tasks that does not fit.
    Numerics: see ``dual_cone.project``.
    Source: Quinton and Rey 2024, Jacobian Descent for Multi-Objective Optimization, arXiv:2406.16232, eq. 5, prop. 1.
        Oracle: ``reference.upgrad``.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.UPGrad(reg_eps=0.0).weights(G)
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """

    def solve(self, gram: Tensor) -> Solution:
        return Solution(self._projected(gram, each=True).sum(dim=-2), coefficients=None)
