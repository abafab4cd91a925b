"""Methods in which task 0 comes first."""

from __future__ import annotations

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
