"""Methods that merge each column of J ``[T, N]`` by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def graddrop(
    rows: Tensor,
    drawn: Tensor,
    leak: Sequence[float] | None = None,
    f: Callable[[Tensor], Tensor] = lambda purity: purity,
) -> Tensor:
    """GradDrop, arXiv:2010.06808, Alg. 1, lines 10 to 15: the merged gradient ``[N]``.

    P = ½ (1 + Σ g / Σ |g|); M_t = [f(P) > U][g_t > 0] + [f(P) < U][g_t < 0]; Σ_t (ℓ_t + (1 − ℓ_t) M_t) g_t.
    Where f(P) = U, which has no probability, the negative are kept, as in the code that people run.

    Args:
        drawn: U ``[N]`` in [0, 1).
        leak: ℓ ``[T]``; None: 0.
    """
    merged = []
    for column, u in zip(rows.double().unbind(dim=1), drawn.double(), strict=True):
        size = column.abs().sum()
        purity = f((1 + column.sum() / size) / 2) if size > 0 else torch.zeros(())
        kept = 0.0
        for entry, share in zip(column.tolist(), [0.0] * len(column) if leak is None else leak, strict=True):
            mask = float(entry > 0) if purity > u else float(entry < 0)
            kept += (share + (1 - share) * mask) * entry
        merged.append(kept)
    return torch.tensor(merged, dtype=torch.float64)


def trimmed_mean(rows: Tensor, trim_number: int) -> Tensor:
    """Coordinate-wise trimmed mean, arXiv:1803.01498, def. 2: the merged gradient ``[N]``.

    Of each column the mean without the ``trim_number`` largest and as many smallest entries.
    """
    merged = []
    for column in rows.double().unbind(dim=1):
        left = sorted(column.tolist())[trim_number : len(column) - trim_number]
        merged.append(sum(left) / len(left))
    return torch.tensor(merged, dtype=torch.float64)
