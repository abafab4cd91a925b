"""Which kernel with which block sizes: from T and the dtype alone, so the same input has the same bits on every GPU.

Sizes that were measured are in ``tuned``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import kernels
from .tuned import SIZES, Key, Sizes

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
# Of a thread, where a kernel needs no more: four programs of four warps take all that a multiprocessor has. Of how many
# rows in blocks that holds.
_REGISTERS = 128
_MAX_ROWS_BOUNDED = 6
# Three tf32 passes keep fp32's 24 bits to within 2^-21; a single pass would keep 11.
_FP32_PRECISION = "tf32x3"


@dataclass(frozen=True, eq=False)
class Choice:
    """A kernel with its compile-time constants. Made once, as it keeps what was compiled.

    Attributes:
        registers: that a thread may have. None: few enough for many threads at a time, for which the assembler spills
            some even where there are more.
    """

    kernel: Any
    constants: dict[str, Any]
    warps: int = _WARPS
    registers: int | None = None
    _compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    def run(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch it. Triton binds the arguments and looks for what it compiled in several times the time that the
        launch takes; to arguments that look the same to it what it has found before is launched at once.
        """
        if kernels.INTERPRETED:
            self._find(grid, args)
            return
        looks = driver.active.get_current_device(), *map(_looks, args)
        known = self._compiled.get(looks)
        if known is not None:
            compiled, constants = known
            compiled[(*grid, 1, 1)[:3]](*args, *constants)
            return
        found = self._find(grid, args)
        if isinstance(found, CompiledKernel):
            self._compiled[looks] = found, tuple(self.constants[name] for name in self.kernel.arg_names[len(args) :])

    @property
    def compiled(self) -> list[Any]:
        """What Triton compiled of it, one for each device and looks of the arguments."""
        return [compiled for compiled, _ in self._compiled.values()]

    def _find(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        return self.kernel[grid](*args, **self.constants, num_warps=self.warps, maxnreg=self.registers)


def _looks(argument: Any) -> Any:
    """All that Triton compiles a kernel for, or more."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up, as Triton's, which takes microseconds outside of a kernel; so does its next power of two."""
    return -(-numerator // denominator)


def power_of_two_from(number: int) -> int:
    return 1 << (number - 1).bit_length()


def on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device's stream, which need not be the tensor's.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _columns_a_block(tasks: int, dtype: torch.dtype) -> int:
    """Enough columns that each thread has about 128 bytes in flight: 16 of each of eight rows, 64 of each of two."""
    return _THREADS * _vector(dtype) * max(1, 8 // power_of_two_from(tasks))


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows_of_tile(tasks: int) -> int:
    return 16 if tasks <= 16 else 32


def key_of(kernel: Any, tasks: int, dtype: torch.dtype) -> Key:
    """Under which a kernel's sizes are in ``tuned``."""
    return kernel.__name__, power_of_two_from(tasks), dtype.itemsize


def sizes_of(kernel: Any, tasks: int, dtype: torch.dtype) -> Sizes:
    """As measured, else by rule."""
    return SIZES.get(key_of(kernel, tasks, dtype)) or _sizes_by_rule(kernel, tasks, dtype)


@cache
def _sizes_by_rule(kernel: Any, tasks: int, dtype: torch.dtype) -> Sizes:
    if kernel is kernels.gram_tiles:
        columns = _TILE_BYTES // (_rows_of_tile(tasks) * dtype.itemsize)
        return Sizes(columns, _WARPS, 4 if dtype.itemsize == 2 else 3)
    if kernel is kernels.mix_tiles:
        pad = power_of_two_from(tasks)
        if pad == 256 and dtype != torch.float64:  # of fewer columns at a time each warp would have all, and spill
            return Sizes(32, 8, 2)
        return Sizes(max(16, 4096 // pad), _WARPS, 3)
    return Sizes(_columns_a_block(tasks, dtype), _WARPS)


def gram_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool) -> Choice:
    """The kernel of the first pass over J."""
    few = tasks <= (_MAX_ROWS_FP32 if dtype == torch.float32 else _MAX_ROWS_OTHER)
    kernel = kernels.gram_rows if few else kernels.gram_tiles
    return _gram_choice(kernel, tasks, dtype, unit, segmented, sizes_of(kernel, tasks, dtype))


@cache
def _gram_choice(kernel: Any, tasks: int, dtype: torch.dtype, unit: int, segmented: bool, sizes: Sizes) -> Choice:
    common, (columns, warps, stages) = {"T": tasks, "UNIT": unit, "SEGMENTED": segmented}, sizes
    if kernel is kernels.gram_rows:
        held = {"BLOCK": columns, "FOLD": _vector(dtype), "STAGES": stages, "ACC": _accumulator(dtype)}
        return Choice(kernel, common | held, warps)
    tiles: dict[str, Any] = {
        "ROWS": _rows_of_tile(tasks),
        "K": columns,
        "EDGE": min(columns, 16),
        "WARPS": warps,
        "PRECISION": _FP32_PRECISION if dtype == torch.float32 else "ieee",
        "STAGES": stages,
    }
    return Choice(kernel, common | tiles, warps)


def block_of(choice: Choice) -> int:
    """Columns that a program takes at a time."""
    constants = choice.constants
    return int(constants["BLOCK"] if "BLOCK" in constants else constants["WARPS"] * constants["K"])


def is_guarded(dtype: torch.dtype) -> bool:
    """Whether squares can leave fp32's range: not those of float16, and float64 rows have no wider range to go to."""
    return dtype in (torch.float32, torch.bfloat16)


@cache
def rescue_choice(tasks: int, unit: int, segmented: bool, block: int) -> Choice:
    """The kernel that redoes rows whose squares fp32 cannot hold."""
    sizes = {"PAD": power_of_two_from(tasks), "BLOCK": block, "ROWS": 8, "COLUMNS": 64}
    constants = {"T": tasks, "UNIT": unit, "SEGMENTED": segmented} | sizes
    return Choice(kernels.gram_rescue, constants, registers=_REGISTERS)


@cache
def reduce_choice(tasks: int, segmented: bool, block: int, guard: bool, again: bool, listed: bool = False) -> Choice:
    """The kernel that adds the partial Grams; ``listed``: whose items are those of blocks."""
    sizes = {"BLOCK": block, "ENTRIES": 4, "DEPTH": 256, "GUARD": guard, "AGAIN": again, "LISTED": listed}
    # Of more tasks the assembler would spill for the sake of more threads.
    registers = _REGISTERS if tasks > 128 else None
    return Choice(kernels.gram_reduce, {"T": tasks, "SEGMENTED": segmented} | sizes, registers=registers)


@cache
def solve_choice(tasks: int) -> Choice:
    """The T×T solve."""
    return Choice(kernels.solve, {"T": tasks, "PAD": power_of_two_from(tasks)})


@cache
def sums_choice(tasks: int) -> Choice:
    """Coefficients to weights."""
    return Choice(kernels.column_sums, {"T": tasks, "PAD": power_of_two_from(tasks)})


def combine_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool) -> Choice:
    """The kernel of w J."""
    return _combine_choice(tasks, dtype, unit, segmented, sizes_of(kernels.combine, tasks, dtype))


@cache
def _combine_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool, sizes: Sizes) -> Choice:
    columns, warps, _ = sizes
    constants = {
        "T": tasks,
        "PAD": power_of_two_from(tasks),
        "UNIT": unit,
        "BLOCK": columns,
        "ACC": _accumulator(dtype),
        "UNROLL": tasks <= _LARGEST_UNROLLED,
        "SEGMENTED": segmented,
    }
    return Choice(kernels.combine, constants, warps)


def mix_choice(tasks: int, dtype: torch.dtype, unit: int, segmented: bool) -> Choice:
    """The kernel of C J."""
    kernel = kernels.mix_rows if tasks <= _MAX_MIX_ROWS else kernels.mix_tiles
    return _mix_choice(kernel, tasks, dtype, unit, segmented, sizes_of(kernel, tasks, dtype))


@cache
def _mix_choice(kernel: Any, tasks: int, dtype: torch.dtype, unit: int, segmented: bool, sizes: Sizes) -> Choice:
    common, (columns, warps, stages) = {"T": tasks, "UNIT": unit, "SEGMENTED": segmented}, sizes
    if kernel is kernels.mix_rows:
        held = {"PAD": power_of_two_from(tasks * tasks), "BLOCK": columns, "ACC": _accumulator(dtype)}
        return Choice(kernel, common | held, warps)
    pad = power_of_two_from(tasks)
    # C's rows by 16 where they are long: shared memory holds so many as there are stages.
    held = {"PAD": pad, "BLOCK": columns, "ROWS": 32 if pad <= 64 else 16}
    tiles = held | {"PRECISION": _FP32_PRECISION, "STAGES": stages}
    return Choice(kernel, common | tiles, warps)


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
_OF_BLOCKS = {
    kernels.gram_rows: kernels.gram_rows_of_blocks,
    kernels.gram_tiles: kernels.gram_tiles_of_blocks,
    kernels.gram_rescue: kernels.gram_rescue_of_blocks,
    kernels.combine: kernels.combine_of_blocks,
}


@cache
def of_blocks(choice: Choice, dtype: torch.dtype) -> Choice:
    """The kernel that does the same on rows that lie in blocks, with the same sizes."""
    kept = {name: value for name, value in choice.constants.items() if name not in ("UNIT", "SEGMENTED")}
    constants = kept | {"D": _DTYPES[dtype]}
    few = choice.kernel is kernels.gram_rows and choice.constants["T"] <= _MAX_ROWS_BOUNDED
    return Choice(_OF_BLOCKS[choice.kernel], constants, choice.warps, _REGISTERS if few else choice.registers)


def tile_pairs(choice: Choice) -> int:
    if "ROWS" not in choice.constants:
        return 1
    tiles = cdiv(choice.constants["T"], choice.constants["ROWS"])
    return int(tiles * (tiles + 1) // 2)
