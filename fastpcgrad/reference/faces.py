"""Methods that minimise over a polytope or a cone, by looking at every face: MGDA, CAGrad, UPGrad, DualProj.

On one face each problem is one of least squares. Of all faces whose answer lies within the face, the right one is that
whose answer no other task objects to; how much one does is measured, and is rounding for the face that is taken. There
are 2^T faces: for small T alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

_DEPENDENT = 1e-10
"""Distance of a vector from the span of others, as a part of its length, below which it counts as lying in it."""
_OBJECTION = 1e-8
"""The most that the answer may be objected to."""


class _Face(NamedTuple):
    """Independent vectors a_k, the rows of A, with Aᵀ = Q R."""

    tasks: list[int]
    q: Tensor
    r: Tensor

    def within(self, vectors: Tensor) -> Tensor:
        """The part in the span of each column of ``[N, R]``."""
        return self.q @ (self.q.mT @ vectors)

    def coordinates(self, vectors: Tensor) -> Tensor:
        """z ``[K, R]`` such that Aᵀ z is the part in the span."""
        return torch.linalg.solve_triangular(self.r, self.q.mT @ vectors, upper=True)

    def with_products(self, products: Tensor) -> Tensor:
        """The x ``[N, R]`` in the span with A x as given."""
        return self.q @ torch.linalg.solve_triangular(self.r.mT, products, upper=False)


def _face(tasks: Sequence[int], vectors: Tensor) -> _Face | None:
    """None where the vectors ``[K, N]`` depend on each other."""
    q, r = torch.linalg.qr(vectors.mT)
    if len(tasks) > vectors.shape[1] or (r.diagonal().abs() <= _DEPENDENT * vectors.norm(dim=1)).any():
        return None
    return _Face(list(tasks), q, r)


def _subsets(tasks: Sequence[int], least: int) -> Iterator[tuple[int, ...]]:
    for size in range(least, len(tasks) + 1):
        yield from combinations(tasks, size)


def mgda(rows: Tensor) -> Tensor:
    """MGDA, Désidéri 2012, doi:10.1016/j.crma.2012.03.014: weights ``[T]`` of the shortest convex combination.

    On the face of some corners it is what a corner has besides its part along the edges that leave it. It is the
    shortest of all where g_t·d ≥ ‖d‖² for every task.
    """
    gradients = rows.double()
    norms = gradients.norm(dim=1)
    best, least = torch.zeros(len(rows), dtype=torch.float64), torch.inf
    for tasks in _subsets(sorted(range(len(rows)), key=lambda t: float(norms[t])), least=1):
        corner, others = gradients[tasks[0]], list(tasks[1:])  # the shortest, which loses least beside the others
        face = _face(others, gradients[others] - corner)
        if face is None:
            continue
        shares = -face.coordinates(corner[:, None])[:, 0]
        first = 1 - shares.sum()
        if first < 0 or (shares < 0).any():
            continue
        d = corner - face.within(corner)
        terms = first * norms[tasks[0]] + shares @ norms[others]
        objection = _objection(gradients @ d - d @ d, norms * terms + d @ d)
        if objection < least:
            best, least = torch.zeros_like(best), objection
            best[tasks[0]], best[others] = first, shares
    return _unopposed(best, least)


def cagrad(rows: Tensor, c: float, norm_eps: float = 1e-4) -> Tensor:
    """CAGrad, arXiv:2110.14048, sec. 3: weights ``[T]`` of the d that maximises min_t g_t·d within ‖d − g_0‖ ≤ c‖g_0‖.

    Some tasks S are the worst off, with the same g_t·d = τ, and d − g_0 is a combination w' of their gradients with
    w' ≥ 0 and length c‖g_0‖. So d = p + τ x, with p what g_0 has besides its part in their span and x the vector in it
    with g_t·x = 1 in S; the length gives two values of τ. It is the maximum where no other task has less than τ.

    Zero at Pareto-stationary points: where g_v, v = w'/Σ w', is shorter than norm_eps·‖J‖_F, or where g_v = 0 and the
    method's λ = c‖g_0‖/‖g_v‖ has no value, so that to each S another task objects. With c = 0 the mean.
    """
    gradients, count = rows.double(), len(rows)
    mean = gradients.mean(dim=0)
    weights, zero = torch.full((count,), 1 / count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    radius, norms = c * float(mean.norm()), gradients.norm(dim=1)
    if c == 0 or radius == 0:
        return weights if c == 0 else zero
    added, least = zero, torch.inf
    for tasks in _subsets(range(count), least=1):
        face = _face(tasks, gradients[list(tasks)])
        if face is None:
            continue
        ones = torch.ones(len(tasks), 1, dtype=torch.float64)
        x, y = face.with_products(ones)[:, 0], face.within(mean)
        # ‖τ x − y‖² = radius²
        half, rest = float(x @ y / (x @ x)), float((y @ y - radius**2) / (x @ x))
        if half**2 < rest:
            continue
        for level in (half + sqrt(half**2 - rest), half - sqrt(half**2 - rest)):
            step = level * x - y
            shares = face.coordinates(step[:, None])[:, 0]
            if (shares < 0).any():
                continue
            terms = norms.mean() + shares @ norms[face.tasks]
            objection = _objection(gradients @ (mean + step) - level, norms * terms + abs(level))
            if objection < least:
                added, least = torch.zeros_like(zero), objection
                added[list(tasks)] = shares
    if least > _OBJECTION or radius / added.sum() < norm_eps * gradients.norm():
        return zero
    return weights + added


def upgrad(
    rows: Tensor, pref_vector: Sequence[float] | None = None, norm_eps: float = 0.0, reg_eps: float = 0.0
) -> Tensor:
    """UPGrad, arXiv:2406.16232, eq. 5: weights ``[T]``, the sum of what each p_t g_t projects to (None: p_t = 1/T).

    As in TorchJD, ‖J‖_F² ≤ norm_eps counts as zero, where the weights are p, and G is G/‖J‖_F² + reg_eps·I: the
    projection is then that of the rows (J/‖J‖_F, √reg_eps·I).
    """
    return _projected(rows, torch.diag(_preferences(rows, pref_vector)), norm_eps, reg_eps).sum(dim=0)


def dualproj(
    rows: Tensor, pref_vector: Sequence[float] | None = None, norm_eps: float = 0.0, reg_eps: float = 0.0
) -> Tensor:
    """DualProj, arXiv:1706.08840, eq. 11: weights ``[T]`` of what p J projects to. See ``upgrad``."""
    return _projected(rows, _preferences(rows, pref_vector)[None], norm_eps, reg_eps)[0]


def _preferences(rows: Tensor, pref_vector: Sequence[float] | None) -> Tensor:
    return torch.tensor([1 / len(rows)] * len(rows) if pref_vector is None else list(pref_vector), dtype=torch.float64)


def _projected(rows: Tensor, lower: Tensor, norm_eps: float, reg_eps: float) -> Tensor:
    """For each u of ``lower`` ``[R, T]`` the v ≥ u for which v J is shortest: u J projected onto the dual cone.

    The cone holds the x with g_t·x ≥ 0 for all t. The projection onto its face where g_t·x = 0 in S is what u J has
    besides its part in their span, −z J; with z ≥ 0 in S, it is that onto the cone where it lies in it.
    """
    gradients = rows.double()
    size = gradients.norm()
    if not size**2 > norm_eps or size == 0:
        return lower.clone()
    # The cone and the nearest point do not depend on the lengths of the gradients, but z does.
    gradients = torch.cat([gradients / size, sqrt(reg_eps) * torch.eye(len(rows), dtype=torch.float64)], dim=1)
    norms = gradients.norm(dim=1)
    there = [t for t in range(len(rows)) if norms[t] > 0]
    units = gradients / norms.where(norms > 0, 1.0)[:, None]
    best, least = lower.clone(), [torch.inf] * len(lower)
    wanted = (lower @ gradients).mT
    for tasks in _subsets(there, least=0):
        face = _face(tasks, units[list(tasks)])
        if face is None:
            continue
        shares = -face.coordinates(wanted)
        for k in (shares >= 0).all(dim=0).nonzero().flatten().tolist():
            z, p = shares[:, k], wanted[:, k] - face.within(wanted[:, k])
            objection = _objection(units @ p, lower[k].abs() @ norms + z.sum())
            if objection < least[k]:
                best[k], least[k] = lower[k], objection
                best[k, face.tasks] += z / norms[face.tasks]
    return _unopposed(best, max(least))


def _objection(products: Tensor, scales: Tensor) -> float:
    """How far a product lies below zero at most, as a part of the terms that it is made of."""
    return float((-products / scales.where(scales > 0, 1.0)).max().clamp_min(0))


def _unopposed(best: Tensor, objection: float) -> Tensor:
    if not objection <= _OBJECTION:
        raise ArithmeticError(f"no face has the answer; what comes nearest is off by {objection:.1e}")
    return best
