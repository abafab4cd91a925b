# mypy: ignore-errors
# A kernel's parameters are typed by Triton (constexpr, or the string annotations that fix a width), not by Python.
"""The Triton kernels: Gram, its reduction and its rescue, the T×T solve, combine and mix.

Addressing. Every offset is int64. ``stride`` counts units of ``UNIT`` elements: where base and row stride are
16-byte aligned the host passes ``UNIT`` = 16 / itemsize, so that the compiler knows each row's alignment and loads
16 bytes at once; else ``UNIT`` = 1. Loops over whole blocks carry no column mask, which would undo that.

Items. Blocks of columns lie on one grid from column 0, whatever the segments. A (block, segment) pair that meet has
item number block + segment: going through the columns, each new pair raises one of the two, so numbers are unique
and below blocks + segments - 1, and a binary search in the segment offsets finds the pair again, with no table.

Partial Grams. An item writes the lower triangle, packed by rows (entry i(i+1)/2 + j), as float64.
"""

from .blocks import combine_of_blocks, gram_rescue_of_blocks, gram_rows_of_blocks, gram_tiles_of_blocks
from .columns import INTERPRETED
from .combinations import combine, mix_rows, mix_tiles
from .products import gram_reduce, gram_rescue, gram_rows, gram_tiles
from .projections import column_sums, solve

__all__ = [
    "INTERPRETED",
    "column_sums",
    "combine",
    "combine_of_blocks",
    "gram_reduce",
    "gram_rescue",
    "gram_rescue_of_blocks",
    "gram_rows",
    "gram_rows_of_blocks",
    "gram_tiles",
    "gram_tiles_of_blocks",
    "mix_rows",
    "mix_tiles",
    "solve",
]
