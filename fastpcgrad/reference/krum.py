"""Krum: the task gradients nearest to their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def krum_scores(rows: Tensor, n_byzantine: int, squared: bool) -> list[float]:
    """For each row the sum of its (squared) distances to the T − f − 2 others nearest to it."""
    scores = []
    for i, row in enumerate(rows.double()):
        distances = sorted(float((row - other).norm()) for j, other in enumerate(rows.double()) if j != i)
        scores.append(sum(d * d if squared else d for d in distances[: len(rows) - n_byzantine - 2]))
    return scores


def krum(rows: Tensor, n_byzantine: int, n_selected: int = 1, squared: bool = True) -> Tensor:
    """Krum and Multi-Krum, arXiv:1703.02757, sec. 4: weights ``[T]``, 1/m for the m rows with the lowest scores.

    Of equal scores the first row is selected.

    Args:
        n_byzantine: f.
        n_selected: m.
        squared: squared distances, as in the paper; TorchJD takes distances.
    """
    scores = krum_scores(rows, n_byzantine, squared)
    selected = sorted(range(len(rows)), key=lambda i: scores[i])[:n_selected]
    weights = torch.zeros(len(rows), dtype=torch.float64)
    weights[selected] = 1 / n_selected
    return weights
