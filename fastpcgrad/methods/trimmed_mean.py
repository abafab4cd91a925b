"""Trimmed mean: in each column the largest and the smallest entries are left out."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ._count import count
from .elementwise import Elementwise


class TrimmedMean(Elementwise):
    """In each column the mean of what is left without the ``trim_number`` largest and as many smallest entries.

    Args:
        trim_number: how many are left out at either end. Needs T ≥ 2 trim_number + 1.
    Raises:
        TypeError, ValueError: a bad count; when merging, too few tasks.
    Numerics: see ``Elementwise.aggregate``. An entry that is not finite makes its column NaN, although it would be
        trimmed away: a broken gradient must be seen.
    Source: Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates,
        arXiv:1803.01498, def. 2 (there β = trim_number / T).
    Example:
        >>> J = torch.tensor([[1.0, 5.0], [2.0, -5.0], [9.0, 1.0]])
        >>> fastpcgrad.methods.TrimmedMean(trim_number=1).aggregate(J)
        tensor([2., 1.])
    """

    def __init__(self, trim_number: int) -> None:
        self.trim_number = count("trim_number", trim_number, 0)

    def check_tasks(self, tasks: int) -> None:
        if tasks < 2 * self.trim_number + 1:
            raise ValueError(
                f"TrimmedMean with trim_number={self.trim_number} needs at least {2 * self.trim_number + 1} task "
                f"gradients; found {tasks}"
            )

    def columns(self, columns: Tensor) -> Tensor:
        entries = list(columns)
        for low, high in _sorting_network(len(entries)) if self.trim_number else ():
            small = torch.minimum(entries[low], entries[high])
            entries[high] = torch.maximum(entries[low], entries[high])
            entries[low] = small
        left = entries[self.trim_number : len(entries) - self.trim_number]
        merged = torch.stack(left).mean(dim=0)
        return merged.add_((columns * 0).sum(dim=0))  # zero, or NaN where an entry is not finite

    def __repr__(self) -> str:
        return f"TrimmedMean(trim_number={self.trim_number})"


@cache
def _sorting_network(size: int) -> tuple[tuple[int, int], ...]:
    """Pairs of places to compare and exchange in turn, after which any ``size`` numbers are sorted.

    Whole rows can be compared, where a sort of each column cannot be vectorised.
    Source: Batcher's merge exchange; Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M.
    """
    pairs = []
    top = 1 << max(0, (size - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return tuple(pairs)
