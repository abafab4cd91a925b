"""Sorting networks: whole rows can be compared and exchanged, where a sort of each column cannot be vectorised."""

from __future__ import annotations


def sorting_network(size: int) -> tuple[tuple[int, int], ...]:
    """Pairs of places to compare and exchange in turn, after which any ``size`` numbers are sorted.

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
