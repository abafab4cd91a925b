"""ConFIG: the direction that makes the wanted angle with every task gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ._count import count
from ._task_vector import Preference, TaskVector, shown, task_vector
from .base import Method, Solution
from .solvers.problems import CompiledSolver, check_gram, compiled

Length = Literal["projection", "min", "max", "mean", "geometric", "harmonic"]

_EPS = torch.finfo(torch.float64).eps


class ConFIG(Method):
    """The direction whose cosine with each task gradient is the same, as long as all of them together ask for.

    That is x = pinv(U) p with the unit task gradients U as rows, and p = 1: ones, so that U x = p where the task
    gradients are linearly independent. Its length is the sum of their projections onto it.

    Args:
        pref_vector: p, what the cosines shall be proportional to, ``[T]``; None: 1 each.
        length: of which task gradients the projections are summed. ``projection``: of these, as in the paper. Else of
            their directions, all of one length: ``min``, the least of theirs, ``max``, ``mean``, ``geometric`` or
            ``harmonic`` mean, of those that are not zero; or the index of a task, whose gradient's it is. These are the
            authors' TrackMinimum, TrackMaximum, TrackArithmeticAverage, TrackGeometricAverage, TrackHarmonicAverage
            and TrackSpecific.
    Raises:
        TypeError, ValueError: a bad preference vector or length; when solving, a number of tasks that does not fit, or
            the task of ``length`` is absent.
    Numerics: pinv(U) p = Uᵀ pinv(U Uᵀ) p comes from the eigenvalues of the Gram matrix of the unit gradients, float64,
        whatever the dtype of the rows. Eigenvalues below 8 T eps of the largest count as zero: a task gradient
        nearer than about 1e-7 of its norm to the span of the others depends on them, where a pseudoinverse of U sees
        down to about 1e-15. A zero gradient has no direction and weight 0; where p has no part in the span (two exact
        opposites), all weights are 0. On the device of G, see ``_compiled.CompiledMethod``; where the library is not,
        by torch, whose ``eigh`` waits for a GPU.
    Source: Liu, Chu and Thuerey 2024, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks,
        arXiv:2408.11104, eq. 2; lengths: the authors' code, conflictfree. Oracle: ``reference.conflict_free``.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.ConFIG().weights(G)
        tensor([1.2071, 0.8536], dtype=torch.float64)
    """

    def __init__(self, pref_vector: TaskVector | None = None, length: Length | int = "projection") -> None:
        if isinstance(length, str) and length not in get_args(Length):
            raise ValueError(f"length must be {', '.join(get_args(Length))} or a task's index; found {length!r}")
        self.length: Length | int = length if isinstance(length, str) else count("length", length, 0)
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        self._preference = Preference()

    def solve(self, gram: Tensor) -> Solution:
        return self.solve_for(gram, range(check_gram(gram)[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        check_gram(gram)
        if self.length == "projection":
            return Solution(self._weights(gram), coefficients=None)
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = torch.where(norms == 0, 0.0, 1 / norms)
        # Of gradients that are all of one length it is the sum of the projections, too.
        units = self._weights(gram * inverse[..., :, None] * inverse[..., None, :])
        return Solution(units * inverse * self._common_length(norms, inverse, tasks)[..., None], coefficients=None)

    def _common_length(self, norms: Tensor, inverse: Tensor, tasks: Sequence[int]) -> Tensor:
        """``[]``, or ``[S]``; 0 where there is no gradient."""
        if not isinstance(self.length, str):
            if self.length not in tasks:
                raise ValueError(f"length is that of task {self.length}, which is absent; found tasks {list(tasks)}")
            return norms[..., list(tasks).index(self.length)]
        there = norms != 0
        number = there.sum(dim=-1)
        if self.length == "min":
            found = norms.where(there, torch.inf).amin(dim=-1)
        elif self.length == "max":
            found = norms.amax(dim=-1)
        elif self.length == "mean":
            found = norms.sum(dim=-1) / number
        elif self.length == "geometric":
            found = (norms.where(there, 1.0).log().sum(dim=-1) / number).exp()
        else:
            found = number / inverse.sum(dim=-1)
        return found.where(number > 0, 0.0)

    def _weights(self, gram: Tensor) -> Tensor:
        tasks = gram.shape[-1]
        preference = self._preference.on(gram.device, self.pref_vector, tasks)
        weights = compiled(CompiledSolver("conflict_free"), gram, preference)
        if weights is None:
            weights = self._solved(gram, gram.new_ones(tasks) if preference is None else preference)
        return weights

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
        return f"ConFIG(pref_vector={shown(self.pref_vector)}, length={self.length!r})"
