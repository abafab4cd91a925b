# mypy: ignore-errors
# A kernel's parameters are typed by Triton (constexpr, or the string annotations that fix a width), not by Python.
"""The Gram matrix: its products, their sum, and the rescue of what leaves fp32's range."""

import triton
import triton.language as tl

from .columns import INTEGERS, INTERPRETED, NARROW_BLOCK, locate, partial_blocks, segment_bounds, share

# Squared norms outside 2^-80 .. 2^120 are redone, weights outside 2^-100 .. 2^100 accumulate in float64.
SMALLEST_SQUARE = tl.constexpr(2.0**-80)
LARGEST_SQUARE = tl.constexpr(2.0**120)
REDO = tl.constexpr(1)
REDO_UNLESS_ZERO = tl.constexpr(2)


@triton.jit
def _split_columns(x, FOLD: tl.constexpr):
    """The FOLD neighbouring columns that one thread loaded, as FOLD tensors: registers are only renamed."""
    parts = (x,)
    for level in tl.static_range(3):
        if 2**level < FOLD:
            halves = ()
            for q in tl.static_range(2**level):
                even, odd = tl.split(tl.reshape(parts[q], [parts[q].shape[0] // 2, 2]))
                halves = halves + (even, odd)
            parts = halves
    return parts


@triton.jit
def _load_rows(block, stride, lo, hi, T: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    rows = ()
    for t in tl.static_range(T):
        if MASKED:
            x = tl.load((block + t * stride) + cols, mask=(cols >= lo) & (cols < hi), other=0.0)
        else:
            x = tl.load((block + t * stride) + cols)
        rows = rows + (x,)
    return rows


@triton.jit
def add_products(acc, loaded, T: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr):
    """acc[i, j] += row_i * row_j, a lane a thread and column group."""
    rows = ()
    for t in tl.static_range(T):
        rows = rows + (_split_columns(loaded[t].to(ACC), FOLD),)
    out = ()
    for i in tl.static_range(T):
        for j in tl.static_range(i + 1):
            lanes = acc[i * (i + 1) // 2 + j]
            for q in tl.static_range(FOLD):
                lanes += rows[i][q] * rows[j][q]
            out = out + (lanes,)
    return out


@triton.jit
def eight_sums(acc, g: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr):
    """The sums of accumulators 8g to 8g + 7, which share one reduction across the threads, and so its barriers."""
    e = ()
    for q in tl.static_range(8):
        e = e + (acc[min(8 * g + q, PAIRS - 1)],)
    even = tl.join(tl.join(e[0], e[4]), tl.join(e[2], e[6]))
    odd = tl.join(tl.join(e[1], e[5]), tl.join(e[3], e[7]))
    lanes = tl.reshape(tl.join(even, odd), [LANES, 8])
    return tl.sum(lanes.to(tl.float64), axis=0)


@triton.jit
def pair_of(p):
    """Entry p of the lower triangle → its row and column."""
    # The root of 8p+1 in fp32 may be off by one at either side of a whole number.
    i = ((tl.sqrt((8 * p + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit(do_not_specialize=INTEGERS)
def gram_rows(
    grads, partials, segments, width: "i64", stride: "i64", count: "i64", span: "i64", slots: "i64",
    T: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Small T: a thread owns columns and keeps the whole triangle. The host bounds the products a lane takes."""
    PAIRS: tl.constexpr = T * (T + 1) // 2
    k = tl.program_id(0).to(tl.int64)
    stride = stride.to(tl.int64) * UNIT
    s, first, last, step, lo, hi = share(segments, count, width, k, span, slots, BLOCK, SEGMENTED)

    acc = ()
    for _ in tl.static_range(PAIRS):
        acc = acc + (tl.zeros([BLOCK // FOLD], ACC),)
    for b in tl.range(first, last, step, num_stages=STAGES):
        acc = add_products(acc, _load_rows(grads + b * BLOCK, stride, 0, 0, T, BLOCK, False), T, FOLD, ACC)
    # Partial blocks go a column a thread: no more registers and code than they need.
    left, right, edges = partial_blocks(lo, hi, BLOCK)
    for e in range(0, edges):
        start = tl.where(e == 0, left, right) * BLOCK
        for column in range(start, start + BLOCK, BLOCK // FOLD):
            loaded = _load_rows(grads + column, stride, lo - column, hi - column, T, BLOCK // FOLD, True)
            acc = add_products(acc, loaded, T, 1, ACC)

    for g in tl.static_range((PAIRS + 7) // 8):
        p = 8 * g + tl.arange(0, 8)
        tl.store(partials + k * PAIRS + p, eight_sums(acc, g, PAIRS, BLOCK // FOLD), mask=p < PAIRS)


@triton.jit
def tile_pair(q):
    """Number q of the lower triangle of tiles → (row of tiles, column of tiles)."""
    i = q * 0
    while (i + 1) * (i + 2) // 2 <= q:
        i += 1
    return i, q - i * (i + 1) // 2


@triton.jit
def _load_tile(
    grads, rows, start, stride, lo, hi, T: tl.constexpr, WARPS: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """[WARPS, rows, K]: each warp its own K columns, so that the dot product splits its inner dimension by warp."""
    cols = tl.arange(0, WARPS)[:, None, None] * K + tl.arange(0, K)[None, None, :]
    mask = (rows < T)[None, :, None]
    if MASKED:
        mask = mask & (cols >= lo - start) & (cols < hi - start)
    return tl.load(grads + start + rows.to(tl.int64)[None, :, None] * stride + cols, mask=mask, other=0.0)


@triton.jit
def tile_products(x, y, PRECISION: tl.constexpr):
    """x yᵀ for each warp, in float64: an fp32 accumulator of the tensor cores takes the K columns of one tile."""
    if INTERPRETED:  # NumPy has no bfloat16 products.
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
    return tl.dot(x, tl.permute(y, (0, 2, 1)), input_precision=PRECISION).to(tl.float64)


@triton.jit
def store_tile(partials, g, k, rows, others, T: tl.constexpr):
    i = rows[:, None]
    j = others[None, :]
    tl.store(partials + k * (T * (T + 1) // 2) + i * (i + 1) // 2 + j, g, mask=(i < T) & (j <= i))


@triton.jit(do_not_specialize=INTEGERS)
def gram_tiles(
    grads, partials, segments, width: "i64", stride: "i64", count: "i64", span: "i64", slots: "i64",
    T: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, EDGE: tl.constexpr,
    WARPS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Larger T: tensor-core products of ROWS-row tiles, one pair of tiles a program."""
    BLOCK: tl.constexpr = WARPS * K
    k = tl.program_id(0).to(tl.int64)
    stride = stride.to(tl.int64) * UNIT
    s, first, last, step, lo, hi = share(segments, count, width, k, span, slots, BLOCK, SEGMENTED)
    i, j = tile_pair(tl.program_id(1))
    rows = i * ROWS + tl.arange(0, ROWS)
    others = j * ROWS + tl.arange(0, ROWS)

    total = tl.zeros([WARPS, ROWS, ROWS], tl.float64)
    for b in tl.range(first, last, step, num_stages=STAGES):
        x = _load_tile(grads, rows, b * BLOCK, stride, lo, hi, T, WARPS, K, False)
        y = x
        if T > ROWS:
            y = _load_tile(grads, others, b * BLOCK, stride, lo, hi, T, WARPS, K, False)
        total += tile_products(x, y, PRECISION)
    left, right, edges = partial_blocks(lo, hi, BLOCK)
    # Partial blocks go by narrow tiles, in one loop over both: fewer registers, so that they do not push the loop above
    # into spilling.
    PIECES: tl.constexpr = BLOCK // (WARPS * EDGE)
    for piece in tl.range(0, edges * PIECES, num_stages=1):
        column = tl.where(piece < PIECES, left, right) * BLOCK + piece % PIECES * (WARPS * EDGE)
        x = _load_tile(grads, rows, column, stride, lo, hi, T, WARPS, EDGE, True)
        y = x
        if T > ROWS:
            y = _load_tile(grads, others, column, stride, lo, hi, T, WARPS, EDGE, True)
        total += tile_products(x, y, PRECISION)
    store_tile(partials, tl.sum(total, axis=0), k, rows, others, T)


@triton.jit
def has_nonzero(row, begin, step, lo, hi, BLOCK: tl.constexpr):
    """Whether one row has a nonzero in an item's columns."""
    seen = tl.zeros([min(BLOCK, NARROW_BLOCK)], tl.int32)
    for start in range(begin, hi, step):
        for column in range(0, BLOCK, min(BLOCK, NARROW_BLOCK)):
            at = start + column + tl.arange(0, min(BLOCK, NARROW_BLOCK))
            x = tl.load(row + at, mask=(at >= lo) & (at < hi), other=0.0)
            seen = seen | (x.to(tl.float32) != 0).to(tl.int32)
    return tl.max(seen, axis=0)


@triton.jit
def wide_products(
    row, others, there, begin, step, lo, hi, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Σ row * other over an item's columns, for ROWS pointers to other rows, where they are there, in float64."""
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(begin, hi, step):
        for column in range(0, BLOCK, COLUMNS):
            at = start + column + tl.arange(0, COLUMNS)
            inside = (at >= lo) & (at < hi)
            x = tl.load(row + at, mask=inside, other=0.0).to(tl.float64)
            y = tl.load(others[:, None] + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            total += x[None, :] * y.to(tl.float64)
    return tl.sum(total, axis=1)


@triton.jit
def store_again(partials, flags, sums, k, t, others, T: tl.constexpr):
    """What was redone of flagged row t.

    A pair of flagged rows belongs to the later one, unless that may be a row of zeros and left as it is: then both
    compute the pair, to the same bits.
    """
    other_flag = tl.load(flags + others, mask=others < T, other=0)
    mask = (others <= t) | ((others < T) & (other_flag != REDO))
    i = tl.maximum(others, t)
    j = tl.minimum(others, t)
    tl.store(partials + k * (T * (T + 1) // 2) + i * (i + 1) // 2 + j, sums, mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def gram_rescue(
    grads, partials, flags, segments, width: "i64", stride: "i64", count: "i64", span: "i64", slots: "i64",
    T: tl.constexpr, PAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Redo with float64 products what fp32 could not hold; returns at once where no row is flagged.

    A squared norm of zero is either a row of zeros, whose products are right as they are, or an underflow: such
    rows are read first, by themselves, so that an absent task costs one row's bytes. BLOCK, span and slots are
    those of the first pass: an item has the same columns.
    """
    k = tl.program_id(0).to(tl.int64)
    stride = stride.to(tl.int64) * UNIT
    if SEGMENTED:
        s, lo, hi = locate(segments, count, width, k, span * BLOCK)
        begin = lo // BLOCK * BLOCK
        step = k * 0 + BLOCK
    else:
        s = k * 0
        lo = s
        hi = width + s
        begin = k * BLOCK
        step = slots * BLOCK + s
    flags += s * T
    e = tl.arange(0, PAD)
    any_flag = tl.max(tl.load(flags + e, mask=e < T, other=0), axis=0)
    for t in range(0, tl.where(any_flag > 0, T, 0)):
        row = grads + t * stride
        redo = tl.load(flags + t)
        if redo == REDO_UNLESS_ZERO:
            redo = has_nonzero(row, begin, step, lo, hi, BLOCK)
        if redo > 0:
            for tile in range(0, T, ROWS):
                others = tile + tl.arange(0, ROWS)
                starts = grads + others.to(tl.int64) * stride
                sums = wide_products(row, starts, others < T, begin, step, lo, hi, BLOCK, ROWS, COLUMNS)
                store_again(partials, flags, sums, k, t, others, T)


@triton.jit
def _sum_partials(partials, p, begin, end, PAIRS: tl.constexpr, DEPTH: tl.constexpr):
    total = tl.zeros([DEPTH, p.shape[0]], tl.float64)
    for k in range(begin, end, DEPTH):
        item = k + tl.arange(0, DEPTH)
        mask = (item < end)[:, None] & (p < PAIRS)[None, :]
        total += tl.load(partials + item[:, None] * PAIRS + p[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=INTEGERS)
def gram_reduce(
    partials, flags, segments, gram, width: "i64", count: "i64", span: "i64", slots: "i64",
    T: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr, GUARD: tl.constexpr,
    AGAIN: tl.constexpr, LISTED: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Partial Grams → G, in item order. GUARD flags the rows out of range; AGAIN runs only where some are.

    LISTED: segments are where each problem's items begin.
    """
    PAIRS: tl.constexpr = T * (T + 1) // 2
    groups = (PAIRS + ENTRIES - 1) // ENTRIES
    pid = tl.program_id(0)
    s = (pid // groups).to(tl.int64)
    p = pid % groups * ENTRIES + tl.arange(0, ENTRIES)
    if LISTED:
        begin = tl.load(segments + s)
        end = tl.load(segments + s + 1)
    elif SEGMENTED:
        a, b = segment_bounds(segments, s, width)
        begin = a // (span * BLOCK) + s
        end = tl.where(b > a, (b - 1) // (span * BLOCK) + s + 1, begin)
    else:
        begin = s * 0
        end = slots + begin
    if AGAIN:
        t = tl.arange(0, triton.next_power_of_2(T))
        flagged = tl.max(tl.load(flags + s * T + t, mask=t < T, other=0), axis=0)
        begin = tl.where(flagged > 0, begin, end)

    g = _sum_partials(partials, p, begin, end, PAIRS, DEPTH)
    i, j = pair_of(p)
    mask = p < PAIRS
    if AGAIN:
        # A block of numbers: a truth value the interpreter spreads as the numbers it came from, which are no mask.
        mask = mask & (flagged + 0 * p > 0)
    tl.store(gram + s * (T * T) + i * T + j, g, mask=mask)
    tl.store(gram + s * (T * T) + j * T + i, g, mask=mask)
    if GUARD:
        # A NaN is out of range too: where squares overflow, the parts of a tf32x3 product are infs of either sign.
        in_range = (g >= SMALLEST_SQUARE) & (g <= LARGEST_SQUARE)
        flag = tl.where(g == 0, REDO_UNLESS_ZERO, tl.where(in_range, 0, REDO))
        tl.store(flags + s * T + i, flag, mask=mask & (i == j))
