# mypy: ignore-errors
# A kernel's parameters are typed by Triton (constexpr, or the string annotations that fix a width), not by Python.
"""The passes over rows that lie where autograd put them, each block of columns in memory of its own.

``rows`` is a table of addresses, ``[T, count]``; 0: that task has no gradient there. An item has columns of one block;
``starts``, ``[count + 1]``, is the first item of each, which a binary search turns into the block of an item. Where all
rows of a block are 16-byte aligned its whole pieces are loaded 16 bytes at a time; else an element a thread.

What is absent takes part in nothing: a product of its zeros with an inf of another row, or with its own weight where
that is one, would be NaN.
"""

import triton
import triton.language as tl

from .columns import NARROW_BLOCK
from .combinations import needs_float64, to_rows
from .products import (
    REDO_UNLESS_ZERO,
    add_products,
    eight_sums,
    has_nonzero,
    pair_of,
    store_again,
    store_tile,
    tile_pair,
    tile_products,
    wide_products,
)

COUNTS = ["count", "span", "items"]


@triton.jit
def _block_of_item(starts, count, k):
    b = k * 0
    end = b + count
    while end - b > 1:
        middle = (b + end) // 2
        reached = tl.load(starts + middle) <= k
        b = tl.where(reached, middle, b)
        end = tl.where(reached, end, middle)
    return b


@triton.jit
def _columns(starts, widths, count, k, size):
    """Item k of ``size`` columns → its block, and where it lies in that."""
    b = _block_of_item(starts, count, k)
    lo = (k - tl.load(starts + b)) * size
    return b, lo, tl.minimum(lo + size, tl.load(widths + b))


@triton.jit
def _load_rows(
    rows, count, b, first, lo, hi, T: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """BLOCK columns of each row of block b from ``first`` on, those in [lo, hi); WHOLE: all are, and aligned."""
    cols = first + tl.arange(0, BLOCK)
    loaded = ()
    for t in tl.static_range(T):
        address = tl.load(rows + t * count + b)
        row = address.to(tl.pointer_type(D))
        if WHOLE:
            x = tl.load(tl.multiple_of(row + first, 16) + tl.arange(0, BLOCK), mask=address != 0, other=0.0)
        else:
            x = tl.load(row + cols, mask=(cols >= lo) & (cols < hi) & (address != 0), other=0.0)
        loaded = loaded + (x,)
    return loaded


@triton.jit(do_not_specialize=COUNTS)
def gram_rows_of_blocks(
    rows, partials, starts, widths, aligned, count: "i64", span: "i64",
    T: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Small T, see ``gram_rows``: an item is ``span`` pieces of BLOCK columns, or what is left of them."""
    PAIRS: tl.constexpr = T * (T + 1) // 2
    k = tl.program_id(0).to(tl.int64)
    b, lo, hi = _columns(starts, widths, count, k, span * BLOCK)
    rest = tl.where(tl.load(aligned + b) != 0, lo + (hi - lo) // BLOCK * BLOCK, lo)

    acc = ()
    for _ in tl.static_range(PAIRS):
        acc = acc + (tl.zeros([BLOCK // FOLD], ACC),)
    for first in tl.range(lo, rest, BLOCK, num_stages=STAGES):
        acc = add_products(acc, _load_rows(rows, count, b, first, lo, hi, T, BLOCK, D, True), T, FOLD, ACC)
    for first in range(rest, hi, BLOCK // FOLD):
        acc = add_products(acc, _load_rows(rows, count, b, first, lo, hi, T, BLOCK // FOLD, D, False), T, 1, ACC)

    for g in tl.static_range((PAIRS + 7) // 8):
        p = 8 * g + tl.arange(0, 8)
        inside = p < PAIRS
        i, j = pair_of(p)
        there = tl.load(rows + i * count + b, mask=inside, other=0) != 0
        there = there & (tl.load(rows + j * count + b, mask=inside, other=0) != 0)
        sums = eight_sums(acc, g, PAIRS, BLOCK // FOLD)
        tl.store(partials + k * PAIRS + p, tl.where(there, sums, 0.0), mask=inside)


@triton.jit
def _load_tile(
    addresses, first, hi, WARPS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """See ``products``: [WARPS, rows, K], from column ``first`` of rows that begin at ``addresses``."""
    cols = tl.arange(0, WARPS)[:, None, None] * K + tl.arange(0, K)[None, None, :]
    there = (addresses != 0)[None, :, None]
    start = addresses.to(tl.pointer_type(D))[None, :, None] + first
    if WHOLE:
        return tl.load(tl.multiple_of(start, (16, 16, 16)) + cols, mask=there, other=0.0)
    return tl.load(start + cols, mask=there & (first + cols < hi), other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def gram_tiles_of_blocks(
    rows, partials, starts, widths, aligned, count: "i64", span: "i64",
    T: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, EDGE: tl.constexpr, WARPS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Larger T, see ``gram_tiles``."""
    BLOCK: tl.constexpr = WARPS * K
    k = tl.program_id(0).to(tl.int64)
    b, lo, hi = _columns(starts, widths, count, k, span * BLOCK)
    rest = tl.where(tl.load(aligned + b) != 0, lo + (hi - lo) // BLOCK * BLOCK, lo)
    i, j = tile_pair(tl.program_id(1))
    own = i * ROWS + tl.arange(0, ROWS)
    others = j * ROWS + tl.arange(0, ROWS)
    own_at = tl.load(rows + own * count + b, mask=own < T, other=0)
    others_at = tl.load(rows + others * count + b, mask=others < T, other=0)

    total = tl.zeros([WARPS, ROWS, ROWS], tl.float64)
    for first in tl.range(lo, rest, BLOCK, num_stages=STAGES):
        x = _load_tile(own_at, first, hi, WARPS, K, D, True)
        y = x
        if T > ROWS:
            y = _load_tile(others_at, first, hi, WARPS, K, D, True)
        total += tile_products(x, y, PRECISION)
    for first in tl.range(rest, hi, WARPS * EDGE, num_stages=1):
        x = _load_tile(own_at, first, hi, WARPS, EDGE, D, False)
        y = x
        if T > ROWS:
            y = _load_tile(others_at, first, hi, WARPS, EDGE, D, False)
        total += tile_products(x, y, PRECISION)
    there = (own_at != 0)[:, None] & (others_at != 0)[None, :]
    store_tile(partials, tl.where(there, tl.sum(total, axis=0), 0.0), k, own, others, T)


@triton.jit(do_not_specialize=COUNTS)
def gram_rescue_of_blocks(
    rows, partials, flags, owners, starts, widths, count: "i64", span: "i64",
    T: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """See ``gram_rescue``; ``owners``: the problem of each block."""
    k = tl.program_id(0).to(tl.int64)
    b, lo, hi = _columns(starts, widths, count, k, span * BLOCK)
    step = k * 0 + BLOCK
    flags += tl.load(owners + b) * T
    e = tl.arange(0, PAD)
    any_flag = tl.max(tl.load(flags + e, mask=e < T, other=0), axis=0)
    for t in range(0, tl.where(any_flag > 0, T, 0)):
        address = tl.load(rows + t * count + b)
        row = address.to(tl.pointer_type(D))
        redo = tl.where(address != 0, tl.load(flags + t), 0)
        if redo == REDO_UNLESS_ZERO:
            redo = has_nonzero(row, lo, step, lo, hi, BLOCK)
        if redo > 0:
            for tile in range(0, T, ROWS):
                others = tile + tl.arange(0, ROWS)
                others_at = tl.load(rows + others * count + b, mask=others < T, other=0)
                there = others_at != 0
                pointers = others_at.to(tl.pointer_type(D))
                sums = wide_products(row, pointers, there, lo, step, lo, hi, BLOCK, ROWS, COLUMNS)
                store_again(partials, flags, tl.where(there, sums, 0.0), k, t, others, T)


@triton.jit
def _weighted(rows, weights, count, b, t, first, lo, hi, SIZE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """w_t times SIZE columns of row t, those in [lo, hi); WHOLE: all are, and aligned."""
    address = tl.load(rows + t * count + b)
    row = address.to(tl.pointer_type(D)) + first
    cols = tl.arange(0, SIZE)
    if WHOLE:
        x = tl.load(tl.multiple_of(row, 16) + cols, mask=address != 0, other=0.0)
    else:
        x = tl.load(row + cols, mask=(first + cols >= lo) & (first + cols < hi) & (address != 0), other=0.0)
    weight = tl.where(address != 0, tl.load(weights + t), 0.0)
    return weight.to(ACC) * x.to(ACC)


@triton.jit
def _combine_partly(
    rows, weights, out, count, b, lo, hi, T: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The columns [lo, hi) of an item, in the order and with the roundings of a whole one."""
    for first in range(lo, hi, min(BLOCK, NARROW_BLOCK)):
        acc = tl.zeros([min(BLOCK, NARROW_BLOCK)], ACC)
        for t in range(0, T):
            acc += _weighted(rows, weights, count, b, t, first, lo, hi, min(BLOCK, NARROW_BLOCK), ACC, D, False)
        cols = first + tl.arange(0, min(BLOCK, NARROW_BLOCK))
        tl.store(out + cols, to_rows(acc, D), mask=cols < hi)


@triton.jit(do_not_specialize=COUNTS)
def combine_of_blocks(
    rows, outs, weights, owners, starts, widths, aligned, count: "i64", items: "i64",
    T: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Each block combined with the weights of its problem, the last first, into where ``outs`` says, which may be a row
    of it: columns are read, then written."""
    k = items - 1 - tl.program_id(0).to(tl.int64)
    b, lo, hi = _columns(starts, widths, count, k, BLOCK)
    weights += tl.load(owners + b) * T
    out = tl.load(outs + b).to(tl.pointer_type(D))
    t = tl.arange(0, PAD)
    if needs_float64(tl.load(weights + t, mask=t < T, other=0.0)):
        _combine_partly(rows, weights, out, count, b, lo, hi, T, BLOCK, tl.float64, D)
    elif (tl.load(aligned + b) != 0) & (hi - lo == BLOCK):
        acc = tl.zeros([BLOCK], ACC)
        if UNROLL:
            for row in tl.static_range(T):
                acc += _weighted(rows, weights, count, b, row, lo, lo, hi, BLOCK, ACC, D, True)
        else:
            for row in tl.range(0, T, loop_unroll_factor=4):
                acc += _weighted(rows, weights, count, b, row, lo, lo, hi, BLOCK, ACC, D, True)
        tl.store(tl.multiple_of(out + lo, 16) + tl.arange(0, BLOCK), to_rows(acc, D))
    else:
        _combine_partly(rows, weights, out, count, b, lo, hi, T, BLOCK, ACC, D)
