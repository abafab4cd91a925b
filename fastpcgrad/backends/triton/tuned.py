"""How kernels cut the columns where that was measured: data, written by ``python -m benchmarks.tune_triton``.

One table for all GPUs: the sizes decide in which order products are added, and the same input has the same bits
everywhere. What is not in it goes by the rules in ``choices``.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Of a program's piece of J.

    Attributes:
        columns: at a time, of ``gram_tiles`` those of each warp.
        warps: that share them.
        stages: pieces on their way at a time, in the kernels that ask ahead.
    """

    columns: int
    warps: int
    stages: int = 1


Key = tuple[str, int, int]
"""A kernel of packed rows, whose sizes hold for blocks too; T, rounded up to a power of two; bytes of a number."""

SIZES: dict[Key, Sizes] = {}
