"""DualProj: the combined gradient is projected onto the dual cone of the task gradients."""

from __future__ import annotations

from torch import Tensor

from . import _dual_cone
from ._problems import check_gram
from ._task_vector import TaskVector, preferences, shown, task_vector
from .base import Method, Solution


class DualProj(Method):
    """Combine the task gradients by preference, then take the nearest vector that conflicts with no task.

    Args:
        pref_vector: preference of each task, ``[T]``; None: 1/T each.
        norm_eps, reg_eps: see ``UPGrad``.
    Raises:
        TypeError, ValueError: a bad preference vector or eps; when solving, a number of tasks that does not fit.
    Numerics: see ``_dual_cone.project``: float64 on the host, so a GPU waits.
    Source: Lopez-Paz and Ranzato 2017, Gradient Episodic Memory for Continual Learning, arXiv:1706.08840, eq. 11; named
        and compared with UPGrad in arXiv:2406.16232.
    Example:
        >>> G = torch.tensor([[1.0, -2.0], [-2.0, 8.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.DualProj(reg_eps=0.0).weights(G)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, pref_vector: TaskVector | None = None, norm_eps: float = 0.0, reg_eps: float = 1e-4) -> None:
        _dual_cone.check_eps(norm_eps, reg_eps)
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        self.norm_eps, self.reg_eps = norm_eps, reg_eps

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        lower = preferences(self.pref_vector, gram.shape[-1])[None]
        projected = _dual_cone.project(gram, lower, self.norm_eps, self.reg_eps)
        return Solution(projected.squeeze(-2), coefficients=None)

    def __repr__(self) -> str:
        return f"DualProj(pref_vector={shown(self.pref_vector)}, norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"
