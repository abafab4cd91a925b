"""Methods with a closed form that needs a pseudoinverse: IMTL-G, ConFIG and Aligned-MTL, by the singular values of J.

The methods see G in float64 alone, whose eigenvalues σ² are there above some part of the largest. The square root of
that part, ``cut``, is where a singular value counts as zero here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

_EPS = 2.0**-52


def _default_cut(tasks: int) -> float:
    return sqrt(tasks * _EPS)


def imtlg(rows: Tensor, cut: float | None = None) -> Tensor:
    """IMTL-G, Liu et al. 2021 (ICLR): weights ``[T]``, Σ w = 1, of a d with the same u_t·d for all unit gradients u_t.

    An x with g_t·x = ‖g_t‖ for all t has such projections; of all these x the one in the span of the rows is taken, and
    of v with x = v J that of least length; w = v / Σ v. Where there is no such x, that of least squares: the paper's
    inverse becomes a pseudoinverse, as in TorchJD. Zero where Σ v vanishes: |Σ v|·‖J‖_F < 1e-12.
    """
    gradients = rows.double()
    inverse = torch.linalg.pinv(gradients, rtol=_default_cut(len(rows)) if cut is None else cut)
    x = inverse @ gradients.norm(dim=1)
    v = inverse.mT @ x
    total = v.sum()
    return v / total if abs(total) * gradients.norm() >= 1e-12 else torch.zeros_like(v)


def conflict_free(
    rows: Tensor,
    pref_vector: Sequence[float] | None = None,
    cut: float | None = None,
    length: str | int = "projection",
) -> Tensor:
    """ConFIG, arXiv:2408.11104, eq. 2: weights ``[T]`` of d = (Σ_t g_t·x̂) x̂ with x̂ = U(x), x = pinv(U) p.

    U holds the unit task gradients, p the wanted cosines (None: ones). Zero where p has no part in the span of U's
    columns, or where there is no gradient at all. With another ``length`` than the paper's every g_t is first scaled to
    that of one of them, or to a mean of all: the length models of the authors' code, where gradients of zero are NaN;
    here they count for nothing.
    """
    gradients, tasks = rows.double(), len(rows)
    wanted = torch.tensor([1.0] * tasks if pref_vector is None else list(pref_vector), dtype=torch.float64)
    norms = gradients.norm(dim=1)
    inverse_norms = torch.where(norms > 0, 1 / norms, 0.0)
    units = gradients * inverse_norms[:, None]
    inverse = torch.linalg.pinv(units, rtol=sqrt(8) * _default_cut(tasks) if cut is None else cut)
    x = inverse @ wanted
    if (units @ x).norm() <= 1e-12 * wanted.norm():
        return torch.zeros(tasks, dtype=torch.float64)
    unit = x / x.norm()
    if length != "projection":
        gradients = _length(norms, length) * units
    projected = sum(gradient @ unit for gradient in gradients)
    return projected / x.norm() * (inverse.mT @ x) * inverse_norms


def _length(norms: Tensor, length: str | int) -> Tensor:
    if isinstance(length, int):
        return norms[length]
    there = norms[norms > 0]
    return {
        "min": there.min(),
        "max": there.max(),
        "mean": there.mean(),
        "geometric": there.log().mean().exp(),
        "harmonic": len(there) / (1 / there).sum(),
    }[length]


def aligned_mtl(
    rows: Tensor,
    pref_vector: Sequence[float] | None = None,
    scale_mode: Literal["min", "median", "rmse"] = "min",
    cut: float | None = None,
) -> Tensor:
    """Aligned-MTL, arXiv:2305.19000, sec. 3 and Alg. 1: weights ``[T]``, from J = U Σ Vᵀ.

    J is replaced by the nearest matrix with equal singular values, σ U Vᵀ, whose rows are summed by preference (None:
    1/T each): w = σ U Σ⁻¹ Uᵀ p. σ is the smallest singular value, as in the paper; or σ² their (lower) median or mean
    square, as in TorchJD. The preference where J is zero.
    """
    gradients, tasks = rows.double(), len(rows)
    wanted = torch.tensor([1 / tasks] * tasks if pref_vector is None else list(pref_vector), dtype=torch.float64)
    left, singular, _ = torch.linalg.svd(gradients, full_matrices=False)
    kept = singular > singular.max() * (_default_cut(tasks) if cut is None else cut)
    if not kept.any():
        return wanted
    left, singular = left[:, kept], singular[kept]
    scale = {"min": singular.min(), "median": singular.median(), "rmse": singular.square().mean().sqrt()}[scale_mode]
    return scale * (left / singular) @ left.mT @ wanted
