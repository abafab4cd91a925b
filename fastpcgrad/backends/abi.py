"""What the compiled libraries take alike: types of the C ABI, packed rows, rows in blocks, the solve's arguments."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _ops
from .._blocks import Blocks
from ..variants import Guards

POINTER, I64, INT, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
ROWS = (POINTER, I64, I64, I64, INT, POINTER, I64)
BLOCKS = (POINTER, POINTER, I64, I64, INT)
SOLVE = (POINTER, INT, INT, F64, F64)
SOLVERS = {
    "frank_wolfe": 0,
    "shortest_point": 1,
    "conflict_averse": 2,
    "fairness": 3,
    "project_each": 4,
    "project_one": 5,
    "aligned": 6,
    "impartial": 7,
    "conflict_free": 8,
}
"""The solvers of the methods' T×T problems, see ``fpg_solver`` in csrc/fastpcgrad.h."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def rows(grads: Tensor, segments: Tensor | None) -> tuple[int, int, int, int, int, int, int]:
    tasks, width = grads.shape
    pointer, count = (0, 1) if segments is None else (segments.data_ptr(), segments.shape[0] - 1)
    return grads.data_ptr(), tasks, width, grads.stride(0), DTYPES[grads.dtype], pointer, count


def projections(order: Tensor, guards: Guards) -> tuple[int, bool, bool, float, float]:
    return order.data_ptr(), order.dim() == 3, *guards


def dense(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.contiguous()


# G, C and w of all problems, one behind the other in one piece of memory.


def figures_nbytes(tasks: int, problems: int) -> int:
    return 8 * problems * tasks * (2 * tasks + 1)


def figures(memory: int, tasks: int, problems: int) -> tuple[int, int, int]:
    """Where they lie in the ``figures_nbytes`` from ``memory``."""
    square = 8 * problems * tasks * tasks
    return memory, memory + square, memory + 2 * square


def read_figures(memory: Tensor) -> _ops.Figures:
    """Those of one problem, of ``memory`` as float64 ``[2 T + 1, T]``."""
    tasks = memory.shape[1]
    gram, coefficients, weights = memory.split((tasks, tasks, 1))
    return _ops.Figures(gram, weights[0], coefficients)


# Tables of addresses and of 64-bit numbers. The caller keeps them until the library has returned.


def table(rows: Sequence[Sequence[int]]) -> bytes:
    # struct writes addresses in a fifth of the time that array and ctypes take for integers.
    numbers = list(chain.from_iterable(rows))
    return struct.pack(f"{len(numbers)}P", *numbers)


def places(tensors: Sequence[Tensor | None]) -> bytes:
    return struct.pack(f"{len(tensors)}P", *[0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def indices(values: Sequence[int] | None) -> array[int] | None:
    return None if values is None else array("q", values)


def address(numbers: array[int] | array[float] | None) -> int | None:
    return None if numbers is None else numbers.buffer_info()[0]


def blocks(given: Blocks) -> tuple[bytes, int | None, int, int, int]:
    pointers = table(given.pointers)
    return pointers, address(given.widths), len(given.widths), len(given.tensors), DTYPES[given.dtype]


# The methods' T×T problems: G, the solver's parameters, and the preferences.


def solver(name: str, gram: Tensor) -> tuple[int, int, int, int]:
    tasks = gram.shape[-1]
    return SOLVERS[name], gram.data_ptr(), tasks, gram.numel() // (tasks * tasks)


def new_answers(name: str, gram: Tensor) -> Tensor:
    if name == "project_each":
        return torch.empty_like(gram)
    shape = gram.shape  # a number takes a third of the time of a shape
    return gram.new_empty(shape[0] if len(shape) == 2 else shape[:-1])


def gradvac(
    gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor
) -> tuple[int, int, int, int, float, float, int]:
    tasks = gram.shape[-1]
    problems = gram.numel() // (tasks * tasks)
    return gram.data_ptr(), places.data_ptr(), tasks, problems, beta, eps, targets.data_ptr()
