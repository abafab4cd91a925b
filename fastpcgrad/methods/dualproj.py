"""DualProj: the combined gradient is projected onto the dual cone of the task gradients."""

from __future__ import annotations

from torch import Tensor

from ._dual_cone import DualConeMethod
from .base import Solution


class DualProj(DualConeMethod):
    """Combine the task gradients by preference, then take the nearest vector that conflicts with no task.

    Args:
        pref_vector: preference of each task, ``[T]``; None: 1/T each.
        norm_eps, reg_eps: see ``UPGrad``.
    Raises:
        TypeError, ValueError: a bad preference vector or eps; when solving, a number of tasks that does not fit.
    Numerics: see ``dual_cone.project``.
    Source: Lopez-Paz and Ranzato 2017, Gradient Episodic Memory for Continual Learning, arXiv:1706.08840, eq. 11; named
        and compared with UPGrad in arXiv:2406.16232. Oracle: ``reference.dualproj``.
    Example:
        >>> G = torch.tensor([[1.0, -2.0], [-2.0, 8.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.DualProj(reg_eps=0.0).weights(G)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def solve(self, gram: Tensor) -> Solution:
        return Solution(self._projected(gram, each=False), coefficients=None)
