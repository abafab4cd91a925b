"""Host side of the Triton kernels: which kernel, which block sizes, which workspace. No value is read back.

Block sizes and the number of partial Grams follow from T, N and the dtype alone, so the same input gives the same
bits on every GPU. Everything is allocated with ``torch.empty`` and launched on the current stream, so a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...variants import Guards
from ..stacked import Stacked, batch_columns
from . import kernels

_WARPS = 4
_THREADS = 32 * _WARPS
_LARGEST_UNROLLED = 32
# An fp32 accumulator takes at most this many products before they go to float64: a lane that holds one large product
# loses up to half of its last place with each further one, and 32 stay within 1e-6 of the sum of the squares.
_PRODUCTS = 32
# Shares of the columns, and blocks a share should at least have, before partial Grams cost more than they bring.
_SLOTS = 1024
_BLOCKS_A_SLOT = 4
# How far multiply-adds go: above, T(T+1)/2 accumulators leave no registers, and tensor cores take over.
_MAX_ROWS_FP32 = 12
_MAX_ROWS_OTHER = 8
_MAX_MIX_ROWS = 16
# One warp's tile of rows: what its registers hold beside the accumulators.
_TILE_BYTES = 4096
# Three tf32 passes keep fp32's 24 bits to within 2^-21; a single pass would keep 11.
_FP32_PRECISION = "tf32x3"


class Choice(NamedTuple):
    """A kernel with its compile-time constants."""

    kernel: Any
    constants: dict[str, Any]

    def run(self, grid: tuple[int, ...], *args: Any) -> None:
        self.kernel[grid](*args, **self.constants, num_warps=_WARPS)


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


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device's stream, which need not be the tensor's.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows(grads: Tensor, segments: Tensor | None, out: Tensor | None = None) -> _Rows:
    tasks, width = grads.shape
    stride = grads.stride(0) if tasks > 1 else 0
    addresses = [grads.data_ptr(), stride * grads.element_size()]
    if out is not None:
        addresses.append(out.data_ptr())
    unit = 1 if any(address % 16 for address in addresses) else 16 // grads.element_size()
    problems = 1 if segments is None else segments.shape[0] - 1
    return _Rows(tasks, width, stride // unit, unit, segments, problems)


def _vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _columns_a_block(tasks: int, dtype: torch.dtype) -> int:
    """Enough columns that each thread has about 128 bytes in flight: 16 of each of eight rows, 64 of each of two."""
    return _THREADS * _vector(dtype) * max(1, 8 // triton.next_power_of_2(tasks))


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def gram_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool) -> Choice:
    """The kernel of the first pass over J."""
    common = {"T": tasks, "UNIT": unit, "SEGMENTED": segmented}
    if tasks <= (_MAX_ROWS_FP32 if dtype == torch.float32 else _MAX_ROWS_OTHER):
        sizes = {"BLOCK": _columns_a_block(tasks, dtype), "FOLD": _vector(dtype)}
        return Choice(kernels.gram_rows, common | sizes | {"ACC": _accumulator(dtype)})
    rows = 16 if tasks <= 16 else 32
    columns = _TILE_BYTES // (rows * dtype.itemsize)
    precision = _FP32_PRECISION if dtype == torch.float32 else "ieee"
    tiles: dict[str, Any] = {
        "ROWS": rows,
        "K": columns,
        "EDGE": min(columns, 16),
        "WARPS": _WARPS,
        "PRECISION": precision,
        "STAGES": 4 if dtype.itemsize == 2 else 3,
    }
    return Choice(kernels.gram_tiles, common | tiles)


def block_of(choice: Choice) -> int:
    """Columns that a program takes at a time."""
    constants = choice.constants
    return int(constants["BLOCK"] if "BLOCK" in constants else constants["WARPS"] * constants["K"])


def is_guarded(dtype: torch.dtype) -> bool:
    """Whether squares can leave fp32's range: not those of float16, and float64 rows have no wider range to go to."""
    return dtype in (torch.float32, torch.bfloat16)


def rescue_choice(tasks: int, unit: int, segmented: bool, block: int) -> Choice:
    """The kernel that redoes rows whose squares fp32 cannot hold."""
    sizes = {"PAD": triton.next_power_of_2(tasks), "BLOCK": block, "ROWS": 8, "COLUMNS": 64}
    return Choice(kernels.gram_rescue, {"T": tasks, "UNIT": unit, "SEGMENTED": segmented} | sizes)


def reduce_choice(tasks: int, segmented: bool, block: int, guard: bool, again: bool) -> Choice:
    """The kernel that adds the partial Grams."""
    sizes = {"BLOCK": block, "ENTRIES": 4, "DEPTH": 256, "GUARD": guard, "AGAIN": again}
    return Choice(kernels.gram_reduce, {"T": tasks, "SEGMENTED": segmented} | sizes)


def solve_choice(tasks: int) -> Choice:
    """The T×T solve."""
    return Choice(kernels.solve, {"T": tasks, "PAD": triton.next_power_of_2(tasks)})


def sums_choice(tasks: int) -> Choice:
    """Coefficients to weights."""
    return Choice(kernels.column_sums, {"T": tasks, "PAD": triton.next_power_of_2(tasks)})


def combine_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool) -> Choice:
    """The kernel of w J."""
    constants = {
        "T": tasks,
        "PAD": triton.next_power_of_2(tasks),
        "UNIT": unit,
        "BLOCK": _columns_a_block(tasks, dtype),
        "ACC": _accumulator(dtype),
        "UNROLL": tasks <= _LARGEST_UNROLLED,
        "SEGMENTED": segmented,
    }
    return Choice(kernels.combine, constants)


def mix_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool) -> Choice:
    """The kernel of C J."""
    common = {"T": tasks, "UNIT": unit, "SEGMENTED": segmented}
    if tasks <= _MAX_MIX_ROWS:
        sizes = {"PAD": triton.next_power_of_2(tasks * tasks), "BLOCK": _columns_a_block(tasks, dtype)}
        return Choice(kernels.mix_rows, common | sizes | {"ACC": _accumulator(dtype)})
    pad = triton.next_power_of_2(tasks)
    # C's rows by 16 where they are long: shared memory holds them thrice.
    sizes = {"PAD": pad, "BLOCK": max(16, 4096 // pad), "ROWS": 32 if pad <= 64 else 16, "PRECISION": _FP32_PRECISION}
    return Choice(kernels.mix_tiles, common | sizes)


def _shares(rows: _Rows, choice: Choice) -> tuple[int, int]:
    """How many partial Grams there are, and how many blocks of columns each has where it has them in a row."""
    blocks = triton.cdiv(rows.width, block_of(choice))
    slots = max(1, min(_SLOTS, blocks // _BLOCKS_A_SLOT))
    if choice.kernel is kernels.gram_rows:
        # A lane takes FOLD products of each pair of rows from one block, and is flushed once, at the end.
        slots = max(slots, triton.cdiv(blocks * choice.constants["FOLD"], _PRODUCTS))
    else:
        tiles = triton.cdiv(rows.tasks, choice.constants["ROWS"])
        slots = max(1, min(slots, max(64, _SLOTS // (tiles * (tiles + 1)))))
    return slots, triton.cdiv(blocks, slots)


def _tile_pairs(choice: Choice) -> int:
    if "ROWS" not in choice.constants:
        return 1
    tiles = triton.cdiv(choice.constants["T"], choice.constants["ROWS"])
    return int(tiles * (tiles + 1) // 2)


def gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    """G = J Jᵀ in float64, ``[T, T]`` or ``[S, T, T]``."""
    rows = _rows(grads, segments)
    shape = (rows.tasks, rows.tasks) if segments is None else (rows.problems, rows.tasks, rows.tasks)
    if rows.width == 0 or rows.problems == 0:
        return torch.zeros(shape, dtype=torch.float64, device=grads.device)
    choice = gram_choice(rows.tasks, grads.dtype, rows.unit, rows.segmented)
    slots, span = _shares(rows, choice)
    items = rows.items(triton.cdiv(rows.width, span * block_of(choice))) if rows.segmented else slots
    pairs = rows.tasks * (rows.tasks + 1) // 2
    guard = is_guarded(grads.dtype)

    result = torch.empty(shape, dtype=torch.float64, device=grads.device)
    partials = torch.empty((items, pairs), dtype=torch.float64, device=grads.device)
    flags = torch.empty((rows.problems, rows.tasks), dtype=torch.int32, device=grads.device) if guard else None
    geometry = (rows.width, rows.problems, span, slots)
    columns = (rows.width, rows.stride, rows.problems, span, slots)

    def reduce(again: bool) -> None:
        kernel = reduce_choice(rows.tasks, rows.segmented, block_of(choice), guard and not again, again)
        groups = triton.cdiv(pairs, kernel.constants["ENTRIES"])
        kernel.run((rows.problems * groups,), partials, flags, segments, result, *geometry)

    with _on(grads.device):
        choice.run((items, _tile_pairs(choice)), grads, partials, segments, *columns)
        reduce(again=False)
        if guard:
            rescue = rescue_choice(rows.tasks, rows.unit, rows.segmented, block_of(choice))
            rescue.run((items,), grads, partials, flags, segments, *columns)
            reduce(again=True)
    return result


def pcgrad_coefficients(gram: Tensor, order: Tensor, guards: Guards) -> Tensor:
    """C of the sequential projections, from G ``[T, T]`` or ``[S, T, T]``; one order for all problems, or one each."""
    gram, order = gram.contiguous(), order.contiguous()
    tasks = gram.shape[-1]
    coefficients = torch.empty_like(gram)
    problems = 1 if gram.dim() == 2 else gram.shape[0]
    if problems:
        order_stride = 0 if order.dim() == 2 else tasks * tasks
        with _on(gram.device):
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


def _column_sums(coefficients: Tensor, scale: float) -> Tensor:
    weights = torch.empty(coefficients.shape[:-1], dtype=torch.float64, device=coefficients.device)
    problems = 1 if coefficients.dim() == 2 else coefficients.shape[0]
    if problems:
        with _on(coefficients.device):
            sums_choice(coefficients.shape[-1]).run((problems,), coefficients, weights, scale)
    return weights


def combine(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    """out = w J; ``out`` may be a row of J."""
    rows = _rows(grads, segments, out)
    if rows.width == 0 or rows.problems == 0:
        return
    choice = combine_choice(rows.tasks, grads.dtype, rows.unit, rows.segmented)
    items = rows.items(triton.cdiv(rows.width, block_of(choice)))
    with _on(grads.device):
        choice.run(
            (items,),
            *(grads, weights.contiguous(), segments, out, rows.width, rows.stride, rows.problems, items),
        )


def mix_(grads: Tensor, coefficients: Tensor, segments: Tensor | None) -> None:
    """J ← C J in place."""
    rows = _rows(grads, segments)
    if rows.width == 0 or rows.problems == 0:
        return
    choice = mix_choice(rows.tasks, grads.dtype, rows.unit, rows.segmented)
    items = rows.items(triton.cdiv(rows.width, block_of(choice)))
    coefficients = coefficients.contiguous()
    # Converted once here, not once a program: a T×T of conversions costs as much as the products.
    narrow = coefficients if grads.dtype == torch.float64 else coefficients.to(torch.float32)
    with _on(grads.device):
        choice.run(
            (items,),
            *(grads, coefficients, narrow, segments, rows.width, rows.stride, rows.problems, items),
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
    weights = _column_sums(coefficients, scale)
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


def workspace_nbytes(tasks: int, widths: Sequence[int], dtype: torch.dtype, problems: int) -> int:
    """A batch of blocks, its partial Grams, and what they add up to with its flags."""
    columns = batch_columns(tasks, sum(widths), dtype)
    slots, _ = _shares(_Rows(tasks, columns, 0, 1, None, 1), gram_choice(tasks, dtype, 1, segmented=False))
    pairs = tasks * (tasks + 1) // 2
    return tasks * columns * dtype.itemsize + 8 * (slots * pairs + tasks * tasks) + 4 * tasks


_stacked = Stacked(gram, pcgrad_coefficients, combine)
gram_blocks, combine_blocks, pcgrad_blocks = _stacked.gram_blocks, _stacked.combine_blocks, _stacked.pcgrad_blocks
