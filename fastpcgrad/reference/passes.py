"""The passes over J, in float64 whatever the dtype of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def _column_ranges(width: int, segments: Sequence[int] | Tensor | None) -> list[tuple[int, int]]:
    if segments is None:
        return [(0, width)]
    offsets = [int(offset) for offset in segments]
    return list(pairwise(offsets))


def gram(grads: Tensor, segments: Sequence[int] | Tensor | None = None) -> Tensor:
    """G = J Jᵀ in float64: ``[T, T]``, or ``[S, T, T]``, one matrix for each range of columns."""
    blocks = [grads[:, a:b].double() for a, b in _column_ranges(grads.shape[1], segments)]
    matrices = torch.stack([block @ block.mT for block in blocks])
    return matrices[0] if segments is None else matrices


def combine(grads: Tensor, weights: Tensor, segments: Sequence[int] | Tensor | None = None) -> Tensor:
    """w J in float64: ``[N]``. With segments, ``weights`` is ``[S, T]``."""
    rows = weights.double()[None] if segments is None else weights.double()
    ranges = _column_ranges(grads.shape[1], segments)
    return torch.cat([w @ grads[:, a:b].double() for w, (a, b) in zip(rows, ranges, strict=True)])


def mix(grads: Tensor, coefficients: Tensor, segments: Sequence[int] | Tensor | None = None) -> Tensor:
    """C J in float64: ``[T, N]``. With segments, ``coefficients`` is ``[S, T, T]``."""
    matrices = coefficients.double()[None] if segments is None else coefficients.double()
    ranges = _column_ranges(grads.shape[1], segments)
    return torch.cat([c @ grads[:, a:b].double() for c, (a, b) in zip(matrices, ranges, strict=True)], dim=1)
