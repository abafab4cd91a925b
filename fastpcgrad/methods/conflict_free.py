"""ConFIG: the direction that makes the wanted angle with every task gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._task_vector import Preference, TaskVector, shown, task_vector
from .base import Method, Solution
from .solvers.problems import CompiledSolver, check_gram, compiled

_EPS = torch.finfo(torch.float64).eps


class ConFIG(Method):
    """The direction whose cosine with each task gradient is the same, as long as all of them together ask for.

    That is x = pinv(U) p with the unit task gradients U as rows, and p = 1: ones, so that U x = p where the task
    gradients are linearly independent. Its length is the sum of their projections onto it.

    Args:
        pref_vector: p, what the cosines shall be proportional to, ``[T]``; None: 1 each.
    Raises:
        TypeError, ValueError: a bad preference vector; when solving, a number of tasks that does not fit.
    Numerics: pinv(U) p = Uᵀ pinv(U Uᵀ) p comes from the eigenvalues of the Gram matrix of the unit gradients, float64,
        whatever the dtype of the rows. Eigenvalues below 8 T eps of the largest count as zero: a task gradient
        nearer than about 1e-7 of its norm to the span of the others depends on them, where a pseudoinverse of U sees
        down to about 1e-15. A zero gradient has no direction and weight 0; where p has no part in the span (two exact
        opposites), all weights are 0. On the device of G, see ``_compiled.CompiledMethod``; where the library is not,
        by torch, whose ``eigh`` waits for a GPU.
    Source: Liu, Chu and Thuerey 2024, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks,
        arXiv:2408.11104, eq. 2. Oracle: ``reference.conflict_free``.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.ConFIG().weights(G)
        tensor([1.2071, 0.8536], dtype=torch.float64)
    """

    def __init__(self, pref_vector: TaskVector | None = None) -> None:
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        self._preference = Preference()

    def solve(self, gram: Tensor) -> Solution:
        tasks = check_gram(gram)[-1]
        preference = self._preference.on(gram.device, self.pref_vector, tasks)
        weights = compiled(CompiledSolver("conflict_free"), gram, preference)
        if weights is None:
            weights = self._solved(gram, gram.new_ones(tasks) if preference is None else preference)
        return Solution(weights, coefficients=None)

    def _solved(self, gram: Tensor, wanted: Tensor) -> Tensor:
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        unit = gram * inverse[..., :, None] * inverse[..., None, :]
        finite = unit.flatten(-2).isfinite().all(dim=-1)[..., None]
        # eigh raises on what is not finite.
        values, vectors = torch.linalg.eigh(torch.where(finite[..., None], unit, 0.0))

        # p by eigenvector; what is rounding would be blown up by a division.
        noise = 8 * len(wanted) * _EPS
        part = (wanted @ vectors).where(values > noise * values[..., -1:], 0.0)
        part = part.where(part.abs() > noise * wanted.norm(), 0.0)
        solved = part / torch.where(part != 0, values, 1.0)
        # U x, and pinv(G_u) p, of which x = pinv(U) p is the combination of unit gradients
        projections, units = (torch.stack([part, solved], dim=-2) @ vectors.mT).unbind(dim=-2)
        squared = (part * solved).sum(dim=-1, keepdim=True)
        length = (norms * projections).sum(dim=-1, keepdim=True) / torch.where(squared > 0, squared, 1.0)
        return (length * units * inverse).where(finite, torch.nan)

    def __repr__(self) -> str:
        return f"ConFIG(pref_vector={shown(self.pref_vector)})"
