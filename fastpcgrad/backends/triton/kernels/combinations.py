# mypy: ignore-errors
# A kernel's parameters are typed by Triton (constexpr, or the string annotations that fix a width), not by Python.
"""Rows combined and mixed."""

import triton
import triton.language as tl

from .columns import INTEGERS, INTERPRETED, NARROW_BLOCK, columns_of

SMALLEST_WEIGHT = tl.constexpr(2.0**-100)
LARGEST_WEIGHT = tl.constexpr(2.0**100)


@triton.jit
def needs_float64(values):
    size = tl.abs(values)
    outside = (size != 0) & ((size < SMALLEST_WEIGHT) | (size > LARGEST_WEIGHT))
    return tl.max(outside.to(tl.int32)) > 0


@triton.jit
def to_rows(x, dtype: tl.constexpr):
    """Round an accumulator to the rows' dtype."""
    if dtype != tl.float64:
        x = x.to(tl.float32)
    if INTERPRETED:  # Its own conversion truncates.
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, nearest.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _combine_partly(
    block, weights, out, stride, lo, hi, T: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The columns [lo, hi) of one block, in the order and with the roundings of a whole block."""
    for start in range(0, BLOCK, min(BLOCK, NARROW_BLOCK)):
        cols = start + tl.arange(0, min(BLOCK, NARROW_BLOCK))
        mask = (cols >= lo) & (cols < hi)
        acc = tl.zeros([min(BLOCK, NARROW_BLOCK)], ACC)
        for t in range(0, T):
            x = tl.load((block + t * stride) + cols, mask=mask, other=0.0)
            acc += tl.load(weights + t).to(ACC) * x.to(ACC)
        tl.store(out + cols, to_rows(acc, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def combine(
    grads, weights, segments, out, width: "i64", stride: "i64", count: "i64", items: "i64",
    T: tl.constexpr, PAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    UNROLL: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """out = w J, last columns first: gram read those last. ``out`` may be a row: columns are read, then written."""
    k = items - 1 - tl.program_id(0).to(tl.int64)
    stride = stride.to(tl.int64) * UNIT
    s, start, lo, hi = columns_of(segments, count, width, k, BLOCK, SEGMENTED)
    weights += s * T
    t = tl.arange(0, PAD)
    block = grads + start
    if needs_float64(tl.load(weights + t, mask=t < T, other=0.0)):
        _combine_partly(block, weights, out + start, stride, lo, hi, T, BLOCK, tl.float64)
    elif (lo <= 0) & (hi >= BLOCK):
        cols = tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK], ACC)
        if UNROLL:
            for row in tl.static_range(T):
                x = tl.load((block + row * stride) + cols)
                acc += tl.load(weights + row).to(ACC) * x.to(ACC)
        else:
            for row in tl.range(0, T, loop_unroll_factor=4):
                x = tl.load((block + row * stride) + cols)
                acc += tl.load(weights + row).to(ACC) * x.to(ACC)
        tl.store((out + start) + cols, to_rows(acc, out.dtype.element_ty))
    else:
        _combine_partly(block, weights, out + start, stride, lo, hi, T, BLOCK, ACC)


@triton.jit
def _mix_columns(
    block, coefficients, stride, cols, mask, T: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """rows ← C rows over some columns: every row is in registers before the first is written."""
    rows = ()
    for t in tl.static_range(T):
        if MASKED:
            rows = rows + (tl.load((block + t * stride) + cols, mask=mask, other=0.0),)
        else:
            rows = rows + (tl.load((block + t * stride) + cols),)
    for i in range(0, T):
        acc = tl.zeros([COLUMNS], ACC)
        for t in tl.static_range(T):
            acc += tl.load(coefficients + i * T + t).to(ACC) * rows[t].to(ACC)
        mixed = to_rows(acc, block.dtype.element_ty)
        if MASKED:
            tl.store((block + i * stride) + cols, mixed, mask=mask)
        else:
            tl.store((block + i * stride) + cols, mixed)


@triton.jit
def _mix_partly(
    block, coefficients, stride, lo, hi, T: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    for start in range(0, BLOCK, min(BLOCK, NARROW_BLOCK)):
        cols = start + tl.arange(0, min(BLOCK, NARROW_BLOCK))
        mask = (cols >= lo) & (cols < hi)
        _mix_columns(block, coefficients, stride, cols, mask, T, min(BLOCK, NARROW_BLOCK), ACC, True)


@triton.jit(do_not_specialize=INTEGERS)
def mix_rows(
    grads, coefficients, narrow, segments, width: "i64", stride: "i64", count: "i64", items: "i64",
    T: tl.constexpr, PAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """J ← C J for small T, last columns first. ``narrow`` is C in the accumulator's dtype."""
    k = items - 1 - tl.program_id(0).to(tl.int64)
    stride = stride.to(tl.int64) * UNIT
    s, start, lo, hi = columns_of(segments, count, width, k, BLOCK, SEGMENTED)
    coefficients += s * (T * T)
    narrow += s * (T * T)
    e = tl.arange(0, PAD)
    block = grads + start
    if needs_float64(tl.load(coefficients + e, mask=e < T * T, other=0.0)):
        _mix_partly(block, coefficients, stride, lo, hi, T, BLOCK, tl.float64)
    elif (lo <= 0) & (hi >= BLOCK):
        _mix_columns(block, narrow, stride, tl.arange(0, BLOCK), None, T, BLOCK, ACC, False)
    else:
        _mix_partly(block, narrow, stride, lo, hi, T, BLOCK, ACC)


@triton.jit
def _mix_rows_wide(block, coefficients, x, stride, cols, inside, T: tl.constexpr, PAD: tl.constexpr):
    """One row of C at a time over a tile that is already held, in float64."""
    t = tl.arange(0, PAD)
    for row in range(0, T):
        c = tl.load(coefficients + row * T + t, mask=t < T, other=0.0)
        mixed = tl.sum(c[:, None] * x.to(tl.float64), axis=0)
        tl.store(block + row * stride + cols, to_rows(mixed, block.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def mix_tiles(
    grads, coefficients, narrow, segments, width: "i64", stride: "i64", count: "i64", items: "i64",
    T: tl.constexpr, PAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """J ← C J for larger T: a block of all rows is held while C's rows go by, ROWS at a time."""
    k = items - 1 - tl.program_id(0).to(tl.int64)
    stride = stride.to(tl.int64) * UNIT
    s, start, lo, hi = columns_of(segments, count, width, k, BLOCK, SEGMENTED)
    coefficients += s * (T * T)
    narrow += s * (T * T)
    block = grads + start
    t = tl.arange(0, PAD)
    cols = tl.arange(0, BLOCK)
    inside = (cols >= lo) & (cols < hi)
    whole = (lo <= 0) & (hi >= BLOCK)
    address = block + t.to(tl.int64)[:, None] * stride + cols[None, :]
    if whole:
        x = tl.load(address, mask=(t < T)[:, None], other=0.0)
    else:
        x = tl.load(address, mask=(t < T)[:, None] & inside[None, :], other=0.0)

    if grads.dtype.element_ty == tl.float64:
        _mix_rows_wide(block, coefficients, x, stride, cols, inside, T, PAD)
    else:
        wide = k < 0
        for tile in tl.range(0, T, ROWS, num_stages=STAGES):
            i = tile + tl.arange(0, ROWS)
            mask = (i < T)[:, None] & (t < T)[None, :]
            wide = wide | needs_float64(tl.load(coefficients + i[:, None] * T + t[None, :], mask=mask, other=0.0))
        if wide:
            _mix_rows_wide(block, coefficients, x, stride, cols, inside, T, PAD)
        else:
            for tile in tl.range(0, T, ROWS, num_stages=STAGES):
                i = tile + tl.arange(0, ROWS)
                mask = (i < T)[:, None]
                c = tl.load(narrow + i[:, None] * T + t[None, :], mask=mask & (t < T)[None, :], other=0.0)
                product = tl.dot(c, x.to(tl.float32), input_precision=PRECISION)
                mixed = to_rows(product, grads.dtype.element_ty)
                target = block + i.to(tl.int64)[:, None] * stride + cols[None, :]
                if whole:
                    tl.store(target, mixed, mask=mask)
                else:
                    tl.store(target, mixed, mask=mask & inside[None, :])
