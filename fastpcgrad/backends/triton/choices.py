"""Which kernel with which block sizes: from T and the dtype alone, so the same input has the same bits on every GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import kernels

_WARPS = 4
_THREADS = 32 * _WARPS
_LARGEST_UNROLLED = 32
# An fp32 accumulator takes at most this many products before they go to float64: a lane that holds one large product
# loses up to half of its last place with each further one, and 32 stay within 1e-6 of the sum of the squares.
PRODUCTS = 32
# Shares of the columns, and blocks a share should at least have, before partial Grams cost more than they bring.
SLOTS = 1024
BLOCKS_A_SLOT = 4
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


def on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device's stream, which need not be the tensor's.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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


def reduce_choice(tasks: int, segmented: bool, block: int, guard: bool, again: bool, listed: bool = False) -> Choice:
    """The kernel that adds the partial Grams; ``listed``: whose items are those of blocks."""
    sizes = {"BLOCK": block, "ENTRIES": 4, "DEPTH": 256, "GUARD": guard, "AGAIN": again, "LISTED": listed}
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


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
_OF_BLOCKS = {
    kernels.gram_rows: kernels.gram_rows_of_blocks,
    kernels.gram_tiles: kernels.gram_tiles_of_blocks,
    kernels.gram_rescue: kernels.gram_rescue_of_blocks,
    kernels.combine: kernels.combine_of_blocks,
}


def of_blocks(choice: Choice, dtype: torch.dtype) -> Choice:
    """The kernel that does the same on rows that lie in blocks, with the same sizes."""
    kept = {name: value for name, value in choice.constants.items() if name not in ("UNIT", "SEGMENTED")}
    return Choice(_OF_BLOCKS[choice.kernel], kept | {"D": _DTYPES[dtype]})


def tile_pairs(choice: Choice) -> int:
    if "ROWS" not in choice.constants:
        return 1
    tiles = triton.cdiv(choice.constants["T"], choice.constants["ROWS"])
    return int(tiles * (tiles + 1) // 2)
