# mypy: ignore-errors
# A kernel's parameters are typed by Triton (constexpr, or the string annotations that fix a width), not by Python.
"""Where the columns of a program's items lie."""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Whether kernels run as NumPy: TRITON_INTERPRET=1 when triton was imported.
INTERPRETED = tl.constexpr(isinstance(tl.sum, InterpretedFunction))
# Columns at a time where a block is not whole, or its weights need float64: few, so that this rare work does not
# set the registers of the whole kernel.
NARROW_BLOCK = tl.constexpr(512)
INTEGERS = ["width", "stride", "count", "span", "slots", "items"]


@triton.jit
def segment_bounds(segments, s, width):
    """Columns [a, b) of segment s; clamped, for offsets on the device cannot be validated without a sync."""
    a = tl.minimum(tl.maximum(tl.load(segments + s), 0), width)
    b = tl.minimum(tl.maximum(tl.load(segments + s + 1), a), width)
    return a, b


@triton.jit
def locate(segments, count, width, k, block):
    """Item k → its segment, and the columns [lo, hi) where that segment meets block k - segment."""
    s = k * 0
    end = s + count
    while end - s > 1:
        middle = (s + end) // 2
        reached = tl.load(segments + middle) // block + middle <= k
        s = tl.where(reached, middle, s)
        end = tl.where(reached, end, middle)
    a, b = segment_bounds(segments, s, width)
    lo = tl.maximum(a, (k - s) * block)
    hi = tl.maximum(tl.minimum(b, (k - s + 1) * block), lo)
    return s, lo, hi


@triton.jit
def share(segments, count, width, k, span, slots, BLOCK: tl.constexpr, SEGMENTED: tl.constexpr):
    """Gram item k → its segment; the whole blocks first, first + step, ... < last; its partial blocks' [lo, hi)."""
    if SEGMENTED:
        s, lo, hi = locate(segments, count, width, k, span * BLOCK)
        first = (lo + BLOCK - 1) // BLOCK
        last = hi // BLOCK
        step = s * 0 + 1
    else:
        # Strided shares: all items walk through the columns together, so the last columns are in L2 at the end.
        s = k * 0
        first = k
        last = width // BLOCK + s
        step = slots + s
        # Numbers of blocks fit 32 bits, where a division takes a few instructions rather than a call.
        owner = last.to(tl.int32) % slots.to(tl.int32)
        lo = tl.where(owner == k, last * BLOCK, width)
        hi = width + s
    return s, first, last, step, lo, hi


@triton.jit
def partial_blocks(lo, hi, BLOCK: tl.constexpr):
    """Which partial blocks [lo, hi) has: the first one's number, the last one's, and how many (0, 1 or 2)."""
    left = lo // BLOCK
    right = hi // BLOCK
    has_left = (lo % BLOCK != 0) & (hi > lo)
    has_right = (hi % BLOCK != 0) & (hi > lo) & ((right != left) | (lo % BLOCK == 0))
    return tl.where(has_left, left, right), right, has_left.to(tl.int32) + has_right.to(tl.int32)


@triton.jit
def columns_of(segments, count, width, k, BLOCK: tl.constexpr, SEGMENTED: tl.constexpr):
    """Item k of combine and mix → its segment, its block's first column, and where [lo, hi) lies in the block."""
    if SEGMENTED:
        s, lo, hi = locate(segments, count, width, k, BLOCK)
        start = (k - s) * BLOCK
    else:
        s = k * 0
        start = k * BLOCK
        lo = start
        hi = tl.minimum(start + BLOCK, width)
    return s, start, lo - start, hi - start
