"""UPGrad: each task gradient is projected onto the dual cone of all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dual_cone
from ._problems import check_gram
from ._task_vector import TaskVector, preferences, shown, task_vector
from .base import Method, Solution


class UPGrad(Method):
    """Replace each task gradient by the nearest vector that conflicts with no task, then combine by preference.

    Args:
        pref_vector: preference of each task, ``[T]``; None: 1/T each.
        norm_eps: a Gram matrix whose trace is not above it counts as zero: the answer is then the combination by
            preference alone. 0 by default, so that the answer scales with the gradients; TorchJD has 1e-4.
        reg_eps: added to the diagonal of G / tr G, as TorchJD does. It keeps the weights small where task
            gradients depend on each other, and lets a conflict of this relative size through. With 0 the
            projections are exact.
    Raises:
        TypeError, ValueError: a bad preference vector or eps; when solving, a number of tasks that does not fit.
    Numerics: see ``_dual_cone.project``: float64 on the host, so a GPU waits.
    Source: Quinton and Rey 2024, Jacobian Descent for Multi-Objective Optimization, arXiv:2406.16232, eq. 5, prop. 1.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.UPGrad(reg_eps=0.0).weights(G)
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """

    def __init__(self, pref_vector: TaskVector | None = None, norm_eps: float = 0.0, reg_eps: float = 1e-4) -> None:
        _dual_cone.check_eps(norm_eps, reg_eps)
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        self.norm_eps, self.reg_eps = norm_eps, reg_eps

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        lower = torch.diag(preferences(self.pref_vector, gram.shape[-1]))
        projected = _dual_cone.project(gram, lower, self.norm_eps, self.reg_eps)
        return Solution(projected.sum(dim=-2), coefficients=None)

    def __repr__(self) -> str:
        return f"UPGrad(pref_vector={shown(self.pref_vector)}, norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"
