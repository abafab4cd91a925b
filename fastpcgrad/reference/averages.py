"""Methods that average over the steps: what they keep goes in and comes out."""

from __future__ import annotations

from torch import Tensor


def averaged_weights(new: Tensor, known: Tensor | None, alpha: float) -> Tensor:
    """CR-MOGM, Zhou et al. 2022 (NeurIPS), Alg. 1: λ_k = α λ_(k-1) + (1 − α) λ̂_k, where λ_0 is λ̂_1 unless given."""
    return new if known is None else alpha * known + (1 - alpha) * new
