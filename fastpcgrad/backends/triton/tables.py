"""Surgery on rows that lie where autograd put them: their addresses go to the device in one table.

It is copied without a wait; a captured graph keeps it in its kernels' arguments, as it replays with the same addresses.
For G rows are packed where each of many small blocks would have a large partial one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _ops
from ..._blocks import Blocks
from ...variants import Guards
from .. import abi
from ..stacked import Stacked, batch_columns, combine_projected
from .choices import (
    BLOCKS_A_SLOT,
    PRODUCTS,
    SLOTS,
    Choice,
    block_of,
    cdiv,
    combine_choice,
    gram_choice,
    is_guarded,
    of_blocks,
    on,
    reduce_choice,
    rescue_choice,
    tile_pairs,
)
from .launch import combine, gram, partials_nbytes, pcgrad_coefficients

_packed = Stacked(gram, pcgrad_coefficients, combine)
_LARGEST_PARTIALS = 64 << 20
"""Bytes of partial Gram matrices, or a sixteenth of J if that is more."""


class _Items(NamedTuple):
    """A pass over the blocks.

    Attributes:
        starts: ``[count + 1]``, the first item of each block.
        number: of all.
    """

    starts: Tensor
    number: int


class _Table(NamedTuple):
    """Blocks on the device, those of one problem side by side; only such as have columns and some task's gradient.

    Attributes:
        rows: where each task's row begins, ``[T, count]``; 0: it has none.
        outs: where the merged one goes.
        widths: columns.
        aligned: whether all of these begin at multiples of 16 bytes.
        owners: the problem.
        firsts: ``[problems + 1]``, the first item of each problem in the pass for G.
        gram, combine: the passes.
        blocks: how many; what is on the device may be longer.
    """

    rows: Tensor
    outs: Tensor
    widths: Tensor
    aligned: Tensor
    owners: Tensor
    firsts: Tensor
    gram: _Items
    combine: _Items
    blocks: int


class _Sizes(NamedTuple):
    """How the columns of blocks are cut into items: ``span`` pieces of the Gram kernel, one piece of the other."""

    gram: Choice
    span: int
    combine: Choice


def _sizes(tasks: int, widths: Sequence[int], dtype: torch.dtype) -> _Sizes:
    """From T, the widths and the dtype alone."""
    first = gram_choice(tasks, dtype, 1, segmented=False)
    if "FOLD" in first.constants:
        span = PRODUCTS // first.constants["FOLD"]
    else:
        pieces = sum(widths) // block_of(first)
        slots = max(64, SLOTS // (2 * tile_pairs(first)))
        span = max(1, min(BLOCKS_A_SLOT, pieces), pieces // slots)
    return _Sizes(first, span, combine_choice(tasks, dtype, 1, segmented=False))


def _table(
    blocks: Blocks, sizes: _Sizes, problem_of: Sequence[int] | None, problems: int, out: Sequence[Tensor | None] | None
) -> _Table:
    parts = _numbers(blocks, sizes, problem_of, problems, out)
    # Each of an even length: Triton compiles a kernel for pointers to multiples of 16 bytes, and another for others.
    padded = [np.pad(part, (0, len(part) % 2)) for part in parts]
    whole = _ops.to_device(torch.from_numpy(np.concatenate(padded)), blocks.device, constant=True)
    rows, outs, widths, aligned, owners, firsts, gram, combine = whole.split(list(map(len, padded)))
    of_gram, of_combine = (
        _Items(starts, int(numbers[-1])) for starts, numbers in zip((gram, combine), parts[-2:], strict=True)
    )
    return _Table(rows, outs, widths, aligned, owners, firsts, of_gram, of_combine, len(parts[1]))


def _numbers(
    blocks: Blocks, sizes: _Sizes, problem_of: Sequence[int] | None, problems: int, out: Sequence[Tensor | None] | None
) -> list[Any]:
    """What the table is made of, in the order of its attributes, int64."""
    tasks, count = len(blocks.tensors), len(blocks.widths)
    rows = np.frombuffer(abi.table(blocks.pointers), np.int64).reshape(tasks, count)
    widths = np.frombuffer(blocks.widths, np.int64)
    owners = np.zeros(count, np.int64) if problem_of is None else np.array(problem_of, np.int64)
    outs = np.zeros(count, np.int64) if out is None else np.frombuffer(abi.places(out), np.int64)
    chosen = np.flatnonzero((widths > 0) & (owners >= 0) & rows.any(axis=0))
    chosen = chosen[np.argsort(owners[chosen], kind="stable")]
    rows, widths, owners, outs = rows[:, chosen], widths[chosen], owners[chosen], outs[chosen]
    aligned = ((rows | outs) % 16 == 0).all(axis=0).astype(np.int64)
    gram, combine = (
        np.concatenate([[0], np.cumsum(-(-widths // columns))])
        for columns in (sizes.span * block_of(sizes.gram), block_of(sizes.combine))
    )
    firsts = gram[np.searchsorted(owners, np.arange(problems + 1))]
    return [rows.ravel(), outs, widths, aligned, owners, firsts, gram, combine]


def _gram(blocks: Blocks, sizes: _Sizes, table: _Table, problems: int) -> Tensor:
    tasks, device = len(blocks.tensors), blocks.device
    choice = of_blocks(sizes.gram, blocks.dtype)
    block, pairs, guard = block_of(choice), tasks * (tasks + 1) // 2, is_guarded(blocks.dtype)
    result = torch.empty((problems, tasks, tasks), dtype=torch.float64, device=device)
    partials = torch.empty((table.gram.number, pairs), dtype=torch.float64, device=device)
    flags = torch.empty((problems, tasks), dtype=torch.int32, device=device) if guard else None
    columns = table.gram.starts, table.widths

    def reduce(again: bool) -> None:
        kernel = reduce_choice(tasks, False, block, guard and not again, again, listed=True)
        groups = cdiv(pairs, kernel.constants["ENTRIES"])
        kernel.run((problems * groups,), partials, flags, table.firsts, result, 0, problems, 0, 0)

    with on(device):
        if table.gram.number:
            grid = table.gram.number, tile_pairs(choice)
            choice.run(grid, table.rows, partials, *columns, table.aligned, table.blocks, sizes.span)
        reduce(again=False)
        if guard and table.gram.number:
            rescue = of_blocks(rescue_choice(tasks, 1, False, block), blocks.dtype)
            arguments = table.rows, partials, flags, table.owners, *columns, table.blocks, sizes.span
            rescue.run((table.gram.number,), *arguments)
            reduce(again=True)
    return result


def _combine(blocks: Blocks, sizes: _Sizes, table: _Table, weights: Tensor) -> None:
    if not table.combine.number:
        return
    with on(blocks.device):
        of_blocks(sizes.combine, blocks.dtype).run(
            (table.combine.number,),
            *(table.rows, table.outs, weights.contiguous(), table.owners, table.combine.starts, table.widths),
            *(table.aligned, table.blocks, table.combine.number),
        )


def _partials_nbytes(tasks: int, widths: Sequence[int], sizes: _Sizes) -> int:
    columns = sizes.span * block_of(sizes.gram)
    return 8 * sum(-(-width // columns) for width in widths) * (tasks * (tasks + 1) // 2)


def _is_packed_for_gram(tasks: int, widths: Sequence[int], dtype: torch.dtype, sizes: _Sizes) -> bool:
    rows = tasks * sum(widths) * dtype.itemsize
    return _partials_nbytes(tasks, widths, sizes) > max(_LARGEST_PARTIALS, rows // 16)


def gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    """See ``protocol.BlockFunctions``."""
    tasks, widths, dtype = len(blocks.tensors), blocks.widths, blocks.dtype
    sizes = _sizes(tasks, widths, dtype)
    if not problems or _is_packed_for_gram(tasks, widths, dtype, sizes):
        return _packed.gram_blocks(blocks, problem_of, problems)
    return _gram(blocks, sizes, _table(blocks, sizes, problem_of, problems, None), problems)


def combine_blocks(
    blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
) -> None:
    """See ``protocol.BlockFunctions``."""
    sizes = _sizes(len(blocks.tensors), blocks.widths, blocks.dtype)
    return _combine(blocks, sizes, _table(blocks, sizes, weights_of, len(weights), out), weights)


def pcgrad_blocks(
    blocks: Blocks, order: Tensor, guards: Guards, scale: float, out: Sequence[Tensor | None]
) -> _ops.Later:
    """See ``protocol.BlockFunctions``; both passes by one table."""
    tasks, widths, dtype = len(blocks.tensors), blocks.widths, blocks.dtype
    sizes = _sizes(tasks, widths, dtype)
    if _is_packed_for_gram(tasks, widths, dtype, sizes):
        return _packed.pcgrad_blocks(blocks, order, guards, scale, out)
    table = _table(blocks, sizes, None, 1, out)
    found = _gram(blocks, sizes, table, 1)[0]

    def combine_all(_: Blocks, weights: Tensor, *__: object) -> None:
        _combine(blocks, sizes, table, weights)

    return combine_projected(combine_all, blocks, found, pcgrad_coefficients(found, order, guards), scale, out)


def workspace_nbytes(tasks: int, widths: Sequence[int], dtype: torch.dtype, problems: int) -> int:
    """The table, partial Grams, and what they add up to with its flags; where rows are packed a batch of these."""
    sizes = _sizes(tasks, widths, dtype)
    by_table = 8 * ((tasks + 6) * len(widths) + problems + 11)
    if not _is_packed_for_gram(tasks, widths, dtype, sizes):
        by_table += _partials_nbytes(tasks, widths, sizes)
    columns = batch_columns(tasks, sum(widths), dtype)
    packed = tasks * columns * dtype.itemsize + partials_nbytes(tasks, columns, dtype)
    return max(by_table, packed) + problems * (8 * tasks * tasks + 4 * tasks)
