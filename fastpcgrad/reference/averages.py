"""Methods that average over the steps: what they keep goes in and comes out."""

from __future__ import annotations

import torch
from torch import Tensor


def averaged_weights(new: Tensor, known: Tensor | None, alpha: float) -> Tensor:
    """CR-MOGM, Zhou et al. 2022 (NeurIPS), Alg. 1: λ_k = α λ_(k-1) + (1 − α) λ̂_k, where λ_0 is λ̂_1 unless given."""
    return new if known is None else alpha * known + (1 - alpha) * new


def metabalance(rows: Tensor, known: Tensor, relax_factor: float = 0.7, beta: float = 0.9) -> tuple[Tensor, Tensor]:
    """MetaBalance, arXiv:2203.06801, Alg. 1: weights ``[T]`` of one parameter's gradients, and the magnitudes after it.

    m_t ← β m_t + (1 − β) ‖g_t‖, from 0; g_t becomes r (m_0 / m_t) g_t + (1 − r) g_t, and all are summed. A gradient
    that has always been zero has no part in it.

    Args:
        known: m, ``[T]``.
        relax_factor: r.
    """
    magnitudes = beta * known + (1 - beta) * rows.double().norm(dim=1)
    ratios = [float(magnitudes[0] / m) if m > 0 else 0.0 for m in magnitudes]
    return relax_factor * torch.tensor(ratios, dtype=torch.float64) + (1 - relax_factor), magnitudes
