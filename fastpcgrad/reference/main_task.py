"""Methods in which task 0 comes first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import torch
from torch import Tensor


def agem(rows: Tensor) -> Tensor:
    """A-GEM, arXiv:1812.00420, eq. 11: weights ``[T]`` of g − (g·r / r·r) r where g·r < 0, else of g.

    g is the first row, r the mean of the others, which is no constraint where it is zero, or there is none.
    """
    gradient, *memory = rows.double()
    weights = torch.zeros(len(rows), dtype=torch.float64)
    weights[0] = 1
    if memory:
        reference = torch.stack(memory).mean(dim=0)
        if reference.any() and gradient @ reference < 0:
            weights[1:] = -(gradient @ reference) / (reference @ reference) / len(memory)
    return weights


def pcd(rows: Tensor, means: Sequence[float], tau: Sequence[float], eps: float = 0.0) -> Tensor:
    """PCD, arXiv:2606.29521: weights ``[T]`` of the d nearest to ĝ_0 with ĝ_j·d ≥ τ_j ‖ĝ_j‖² for all j > 0, scaled to
    the length of g_0.

    By trying which constraints bind, as in its app. B.2: those whose least change of ĝ_0 has multipliers that are not
    negative, and breaks none of the others. Without such constraints there is no d, and it is g_0; zero where d is.

    Args:
        means: v̂, the average of ‖g_t‖²; ĝ_t = g_t / √(v̂_t + eps).
        tau: of each task but the first.
    """
    scales = torch.tensor([(mean + eps) ** -0.5 if mean + eps > 0 else 0.0 for mean in means], dtype=torch.float64)
    gradients = rows.double() * scales[:, None]
    lengths = gradients.norm(dim=1)
    main, others = gradients[0], [j for j in range(1, len(rows)) if lengths[j] > 0]
    units = {j: gradients[j] / lengths[j] for j in others}
    weights = torch.zeros(len(rows), dtype=torch.float64)
    if not main.any():
        return weights
    weights[0] = 1.0
    for binding in chain.from_iterable(combinations(others, count) for count in range(len(others) + 1)):
        bound = torch.stack([units[j] for j in binding]) if binding else gradients[:0]
        wanted = torch.stack([tau[j - 1] * lengths[j] for j in binding]) if binding else lengths[:0]
        multipliers = torch.linalg.pinv(bound @ bound.mT, rtol=1e-10, hermitian=True) @ (wanted - bound @ main)
        d = main + multipliers @ bound
        rounding = 1e-9 * float(lengths.max())
        if (multipliers >= -rounding).all() and all(units[j] @ d >= tau[j - 1] * lengths[j] - rounding for j in others):
            weights[list(binding)] = multipliers / lengths[list(binding)]
            break
    d = weights @ gradients
    if not d.norm() > 1e-7 * (weights.abs() @ lengths):
        return torch.zeros_like(weights)
    return weights * scales * rows[0].double().norm() / d.norm()
