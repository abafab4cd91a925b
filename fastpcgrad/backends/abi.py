"""What the compiled libraries take alike: types of the C ABI, packed rows, rows in blocks, the solve's arguments."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _ops

POINTER, I64, INT, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
ROWS = (POINTER, I64, I64, I64, INT, POINTER, I64)
BLOCKS = (POINTER, POINTER, I64, I64, INT)
SOLVE = (POINTER, INT, INT, F64, F64)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def rows(grads: Tensor, segments: Tensor | None) -> tuple[int, int, int, int, int, int | None, int]:
    tasks, width = grads.shape
    pointer, count = (None, 1) if segments is None else (segments.data_ptr(), segments.shape[0] - 1)
    return grads.data_ptr(), tasks, width, grads.stride(0), DTYPES[grads.dtype], pointer, count


def solve(
    order: Tensor, self_projection: bool, eps: float, min_squared_norm: float
) -> tuple[int, bool, bool, float, float]:
    return order.data_ptr(), order.dim() == 3, self_projection, eps, min_squared_norm


def dense(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.contiguous()


# Tables of 64-bit numbers. The caller keeps them until the library has returned.


def table(*rows: Sequence[int]) -> array[int]:
    return array("Q", chain.from_iterable(rows))


def places(out: Sequence[Tensor | None]) -> array[int]:
    return table([0 if tensor is None else tensor.data_ptr() for tensor in out])


def indices(values: Sequence[int] | None) -> array[int] | None:
    return None if values is None else array("q", values)


def address(numbers: array[int] | None) -> int | None:
    return None if numbers is None else numbers.buffer_info()[0]


def blocks(given: _ops.Blocks, pointers: array[int]) -> tuple[int | None, int | None, int, int, int]:
    """``pointers``: the table of ``given.pointers``."""
    return address(pointers), address(given.widths), len(given.widths), len(given.tensors), DTYPES[given.dtype]
