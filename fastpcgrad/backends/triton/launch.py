"""Host side of the Triton kernels: which kernel, which block sizes, which workspace. No value is read back.

Block sizes and the number of partial Grams follow from T, N and the dtype alone, so the same input gives the same
bits on every GPU. Everything is allocated with ``torch.empty`` and launched on the current stream, so a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _ops
from ...variants import Guards
from .. import abi
from . import kernels
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
    mix_choice,
    on,
    reduce_choice,
    rescue_choice,
    solve_choice,
    sums_choice,
    tile_pairs,
)


class _Rows(NamedTuple):
    """What every pass needs to know of the packed rows."""

    tasks: int
    width: int
    stride: int
    unit: int
    segments: Tensor | None
    problems: int

    @property
    def segmented(self) -> bool:
        return self.segments is not None

    def items(self, blocks: int) -> int:
        """How many (block, segment) pairs there can be: see the head of ``kernels``."""
        return blocks + self.problems - 1


def interpreted() -> bool:
    """Whether Triton runs as its interpreter: decided by ``TRITON_INTERPRET`` when triton was imported."""
    return bool(kernels.INTERPRETED)


def _rows(grads: Tensor, segments: Tensor | None, out: Tensor | None = None) -> _Rows:
    """``segments`` as the kernels take them: dense."""
    tasks, width = grads.shape
    stride = grads.stride(0) if tasks > 1 else 0
    addresses = [grads.data_ptr(), stride * grads.element_size()]
    if out is not None:
        addresses.append(out.data_ptr())
    unit = 1 if any(address % 16 for address in addresses) else 16 // grads.element_size()
    problems = 1 if segments is None else segments.shape[0] - 1
    return _Rows(tasks, width, stride // unit, unit, abi.dense(segments), problems)


def _shares(rows: _Rows, choice: Choice) -> tuple[int, int]:
    """How many partial Grams there are, and how many blocks of columns each has where it has them in a row."""
    blocks = cdiv(rows.width, block_of(choice))
    slots = max(1, min(SLOTS, blocks // BLOCKS_A_SLOT))
    if choice.kernel is kernels.gram_rows:
        # A lane takes FOLD products of each pair of rows from one block, and is flushed once, at the end.
        slots = max(slots, cdiv(blocks * choice.constants["FOLD"], PRODUCTS))
    else:
        tiles = cdiv(rows.tasks, choice.constants["ROWS"])
        slots = max(1, min(slots, max(64, SLOTS // (tiles * (tiles + 1)))))
    return slots, cdiv(blocks, slots)


def partials_nbytes(tasks: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the partial Grams of packed rows without segments."""
    slots, _ = _shares(_Rows(tasks, width, 0, 1, None, 1), gram_choice(tasks, dtype, 1, segmented=False))
    return 8 * slots * (tasks * (tasks + 1) // 2)


def gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    """G = J Jᵀ in float64, ``[T, T]`` or ``[S, T, T]``."""
    rows = _rows(grads, segments)
    shape = (rows.tasks, rows.tasks) if segments is None else (rows.problems, rows.tasks, rows.tasks)
    if rows.width == 0 or rows.problems == 0:
        return torch.zeros(shape, dtype=torch.float64, device=grads.device)
    choice = gram_choice(rows.tasks, grads.dtype, rows.unit, rows.segmented)
    slots, span = _shares(rows, choice)
    items = rows.items(cdiv(rows.width, span * block_of(choice))) if rows.segmented else slots
    pairs = rows.tasks * (rows.tasks + 1) // 2
    guard = is_guarded(grads.dtype)

    result = torch.empty(shape, dtype=torch.float64, device=grads.device)
    partials = torch.empty((items, pairs), dtype=torch.float64, device=grads.device)
    flags = torch.empty((rows.problems, rows.tasks), dtype=torch.int32, device=grads.device) if guard else None
    geometry = (rows.width, rows.problems, span, slots)
    columns = (rows.width, rows.stride, rows.problems, span, slots)

    def reduce(again: bool) -> None:
        kernel = reduce_choice(rows.tasks, rows.segmented, block_of(choice), guard and not again, again)
        groups = cdiv(pairs, kernel.constants["ENTRIES"])
        kernel.run((rows.problems * groups,), partials, flags, rows.segments, result, *geometry)

    with on(grads.device):
        choice.run((items, tile_pairs(choice)), grads, partials, rows.segments, *columns)
        reduce(again=False)
        if guard:
            rescue = rescue_choice(rows.tasks, rows.unit, rows.segmented, block_of(choice))
            rescue.run((items,), grads, partials, flags, rows.segments, *columns)
            reduce(again=True)
    return result


def pcgrad_coefficients(gram: Tensor, order: Tensor, guards: Guards) -> Tensor:
    """C of the sequential projections, from G ``[T, T]`` or ``[S, T, T]``; one order for all problems, or one each."""
    gram, order = gram.contiguous(), _ops.beside(order, gram).contiguous()
    tasks = gram.shape[-1]
    coefficients = torch.empty_like(gram)
    problems = 1 if gram.dim() == 2 else gram.shape[0]
    if problems:
        order_stride = 0 if order.dim() == 2 else tasks * tasks
        with on(gram.device):
            solve_choice(tasks).run(
                (problems * tasks,),
                *(
                    gram,
                    order,
                    coefficients,
                    order_stride,
                    int(guards.self_projection),
                    guards.eps,
                    guards.min_squared_norm,
                ),
            )
    return coefficients


def column_sums(coefficients: Tensor, scale: float) -> Tensor:
    weights = torch.empty(coefficients.shape[:-1], dtype=torch.float64, device=coefficients.device)
    problems = 1 if coefficients.dim() == 2 else coefficients.shape[0]
    if problems:
        with on(coefficients.device):
            sums_choice(coefficients.shape[-1]).run((problems,), coefficients, weights, scale)
    return weights


def combine(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    """out = w J; ``out`` may be a row of J."""
    rows = _rows(grads, segments, out)
    if rows.width == 0 or rows.problems == 0:
        return
    choice = combine_choice(rows.tasks, grads.dtype, rows.unit, rows.segmented)
    items = rows.items(cdiv(rows.width, block_of(choice)))
    with on(grads.device):
        choice.run(
            (items,),
            *(grads, weights.contiguous(), rows.segments, out, rows.width, rows.stride, rows.problems, items),
        )


def mix_(grads: Tensor, coefficients: Tensor, segments: Tensor | None) -> None:
    """J ← C J in place."""
    rows = _rows(grads, segments)
    if rows.width == 0 or rows.problems == 0:
        return
    choice = mix_choice(rows.tasks, grads.dtype, rows.unit, rows.segmented)
    items = rows.items(cdiv(rows.width, block_of(choice)))
    coefficients = coefficients.contiguous()
    # Converted once here, not once a program: a T×T of conversions costs as much as the products.
    narrow = coefficients if grads.dtype == torch.float64 else coefficients.to(torch.float32)
    with on(grads.device):
        choice.run(
            (items,),
            *(grads, coefficients, narrow, rows.segments, rows.width, rows.stride, rows.problems, items),
        )


def pcgrad(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    scale: float,
    segments: Tensor | None,
    out: Tensor,
    figures: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """G, C and w = scale · (column sums of C), and out = w J."""
    matrix = gram(grads, segments)
    coefficients = pcgrad_coefficients(matrix, order, guards)
    weights = column_sums(coefficients, scale)
    combine(grads, weights, segments, out)
    return matrix, coefficients, weights


def pcgrad_(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    segments: Tensor | None,
    figures: bool = True,
) -> tuple[Tensor, Tensor]:
    """G and C, and J ← C J in place."""
    matrix = gram(grads, segments)
    coefficients = pcgrad_coefficients(matrix, order, guards)
    mix_(grads, coefficients, segments)
    return matrix, coefficients
