"""MGDA by Frank-Wolfe, as published: another method than the minimum, since it stops short of it for T > 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frank_wolfe(rows: Tensor, epsilon: float = 0.001, max_iters: int = 100) -> Tensor:
    """Sener and Koltun 2018, arXiv:1810.04650, Alg. 2 (FrankWolfeSolver): weights ``[T]``.

    From 1/T: t̂ = argmin_t g_t·d; γ̂ = argmin_γ ‖(1 − γ) d + γ g_t̂‖ (Alg. 1); α ← (1 − γ̂) α + γ̂ e_t̂; until γ̂ < ε.
    """
    gradients = rows.double()
    weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    for _ in range(max_iters):
        merged = weights @ gradients
        task = int((gradients @ merged).argmin())
        step = _nearest(gradients[task], merged)
        weights = (1 - step) * weights
        weights[task] += step
        if step < epsilon:
            break
    return weights


def normalized(rows: Tensor, normalization: str, losses: Sequence[float]) -> Tensor:
    """What the authors' code hands to Alg. 2, and merges: task gradients divided by their norms (``l2``), their losses
    (``loss``), both (``loss+``) or nothing (``none``)."""
    scaled = []
    for row, loss in zip(rows.double(), losses, strict=True):
        norm = float(row.norm())
        scaled.append(row / {"none": 1.0, "l2": norm, "loss": loss, "loss+": norm * loss}[normalization])
    return torch.stack(scaled)


def _nearest(corner: Tensor, merged: Tensor) -> float:
    """Alg. 1: γ in [0, 1] such that γ corner + (1 − γ) merged is shortest; 0 where the two are one point."""
    mixed = float(corner @ merged)
    if mixed >= float(merged @ merged):
        return 0.0
    if mixed >= float(corner @ corner):
        return 1.0
    return float((merged - corner) @ merged) / float((merged - corner) @ (merged - corner))
