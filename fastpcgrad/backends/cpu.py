"""The compiled CPU library: pointers and sizes in, a status out. OpenMP over torch's own thread pool."""

from __future__ import annotations

import ctypes
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import _ops, variants
from .._blocks import Blocks
from ..variants import Guards
from . import abi, eager, native
from .abi import BLOCKS, F64, I64, INT, POINTER, ROWS, SOLVE
from .sorting_network import sorting_network

_ARGUMENTS = {
    "fpg_cpu_gram": (*ROWS, POINTER, INT),
    "fpg_cpu_pcgrad_coefficients": (POINTER, I64, I64, *SOLVE, POINTER, INT),
    "fpg_cpu_combine": (*ROWS, POINTER, POINTER, INT),
    "fpg_cpu_mix": (*ROWS, POINTER, INT),
    "fpg_cpu_pcgrad": (*ROWS, *SOLVE, F64, POINTER, POINTER, POINTER, POINTER, INT),
    "fpg_cpu_gram_blocks": (*BLOCKS, POINTER, I64, POINTER, INT),
    "fpg_cpu_combine_blocks": (*BLOCKS, POINTER, I64, POINTER, POINTER, INT),
    "fpg_cpu_pcgrad_blocks": (*BLOCKS, POINTER, INT, F64, F64, F64, POINTER, POINTER, POINTER, POINTER, INT),
    "fpg_cpu_small_pcgrad": (POINTER,),
    "fpg_cpu_workspace_blocks": (POINTER, I64, I64, INT),
    "fpg_cpu_sign_sums": (POINTER, I64, I64, INT, POINTER, POINTER, INT),
    "fpg_cpu_trimmed_mean": (POINTER, I64, I64, INT, POINTER, I64, I64, POINTER, INT),
    "fpg_cpu_method_weights": (INT, POINTER, I64, I64, POINTER, POINTER, POINTER, INT),
    "fpg_cpu_gradvac": (POINTER, POINTER, I64, I64, F64, F64, POINTER, POINTER, INT),
    "fpg_cpu_permutations": (POINTER, I64, I64, POINTER, INT),
    "fpg_cpu_use_isa": (ctypes.c_char_p,),
    "fpg_cpu_isa": (),
}
_BY_EIGENVALUES = {"aligned", "impartial", "conflict_free"}
_PROJECTIONS = {"project_each", "project_one"}
_LARGEST_BY_JACOBI, _LARGEST_SOLVED = 16, 64
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: MemoryError}


def _load() -> ctypes.CDLL | None:
    library = native.library("cpu")
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.fpg_cpu_isa.restype = ctypes.c_char_p
        library.fpg_cpu_workspace_blocks.restype = I64
    return library


_library = _load()


LARGEST_TASKS = sys.maxsize
_NUMBERS = torch.empty(0, dtype=torch.int64, device="cpu")
"""Of which others are made: to name their dtype and device takes as long as the rest."""


def why_unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return "the CPU library takes CPU tensors only"
    return None if _library is not None else native.load_error("cpu")


def isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``baseline``."""
    name: bytes = _entry("fpg_cpu_isa")()
    return name.decode()


def use_isa(name: str) -> None:
    """Use another instruction set from now on; ValueError where this machine or this build lacks it."""
    if _entry("fpg_cpu_use_isa")(name.encode()) != 0:
        raise ValueError(f"this machine or this build has no instruction set {name!r}")


def _entry(name: str) -> Any:
    return getattr(_library, name)


def _call(name: str, *arguments: object) -> None:
    status = _entry(name)(*arguments, torch.get_num_threads())
    if status:
        raise _error(name, status)


def _error(name: str, status: int) -> Exception:
    return _ERRORS.get(status, RuntimeError)(f"{name} returned status {status}")


def gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    segments = abi.dense(segments)
    result = _ops.new_gram(grads, segments)
    _call("fpg_cpu_gram", *abi.rows(grads, segments), result.data_ptr())
    return result


def pcgrad_coefficients(gram: Tensor, order: Tensor, guards: Guards) -> Tensor:
    gram, order = gram.contiguous(), order.contiguous()
    result = torch.empty_like(gram)
    tasks = gram.shape[-1]
    _call(
        "fpg_cpu_pcgrad_coefficients",
        gram.data_ptr(),
        tasks,
        gram.numel() // (tasks * tasks),
        *abi.projections(order, guards),
        result.data_ptr(),
    )
    return result


def combine(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    weights, segments = weights.contiguous(), abi.dense(segments)
    _call("fpg_cpu_combine", *abi.rows(grads, segments), weights.data_ptr(), out.data_ptr())


def mix_(grads: Tensor, coefficients: Tensor, segments: Tensor | None) -> None:
    coefficients, segments = coefficients.contiguous(), abi.dense(segments)
    _call("fpg_cpu_mix", *abi.rows(grads, segments), coefficients.data_ptr())


def pcgrad(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    scale: float,
    segments: Tensor | None,
    out: Tensor,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    return _pcgrad(grads, order, guards, scale, segments, out.data_ptr(), figures)


def pcgrad_(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    segments: Tensor | None,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    return _pcgrad(grads, order, guards, 1.0, segments, None, figures)[:2]


def _pcgrad(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    scale: float,
    segments: Tensor | None,
    out: int | None,
    figures: bool,
) -> tuple[Tensor, ...]:
    """G, C and w; without ``out`` the rows are mixed in place and w is not written."""
    order, segments = order.contiguous(), abi.dense(segments)
    rows = abi.rows(grads, segments)
    tasks, problems = grads.shape[0], rows[-1]
    if figures:
        found: tuple[Tensor, ...] = _ops.new_figures(grads, segments)
        places = tuple(tensor.data_ptr() for tensor in found)
    else:
        found, memory = (), array("d", bytes(abi.figures_nbytes(tasks, problems)))
        places = abi.figures(memory.buffer_info()[0], tasks, problems)
    _call("fpg_cpu_pcgrad", *rows, *abi.projections(order, guards), scale, *places, out)
    return found


def gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    tasks = len(blocks.tensors)
    result = torch.empty((problems, tasks, tasks), dtype=torch.float64, device=blocks.device)
    owners = abi.indices(problem_of)
    _call("fpg_cpu_gram_blocks", *abi.blocks(blocks), abi.address(owners), problems, result.data_ptr())
    return result


def combine_blocks(
    blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
) -> None:
    weights, owners = weights.contiguous(), abi.indices(weights_of)
    _call(
        "fpg_cpu_combine_blocks",
        *abi.blocks(blocks),
        abi.address(owners),
        weights.shape[0],
        weights.data_ptr(),
        abi.places(out),
    )


def pcgrad_blocks(
    blocks: Blocks,
    order: Tensor,
    guards: Guards,
    scale: float,
    out: Sequence[Tensor | None],
) -> _ops.Later:
    order, tasks = order.contiguous(), len(blocks.tensors)
    result = array("d", bytes(abi.figures_nbytes(tasks, 1)))
    _call(
        "fpg_cpu_pcgrad_blocks",
        *abi.blocks(blocks),
        order.data_ptr(),
        *guards,
        scale,
        *abi.figures(result.buffer_info()[0], tasks, 1),
        abi.places(out),
    )
    return lambda: abi.read_figures(torch.frombuffer(result, dtype=torch.float64).view(-1, tasks))


class SmallPCGrad:
    """``pcgrad_blocks`` of T rows of the same widths again and again, without gaps, merged into the first of them."""

    def __init__(self, tasks: int, widths: array[int], dtype: torch.dtype) -> None:
        self._tasks, self._widths = tasks, widths
        self._shape = abi.address(widths), len(widths), tasks, abi.DTYPES[dtype]
        self._pack = struct.Struct(f"P5q3dP{tasks * tasks}q{tasks * len(widths)}P").pack
        self._empty = bytes(abi.figures_nbytes(tasks, 1))
        self._run = _entry("fpg_cpu_small_pcgrad")

    def __call__(
        self, rows: Sequence[Sequence[Tensor]], order: Iterable[Iterable[int]], guards: Guards, scale: float
    ) -> _ops.Later:
        figures, tasks = array("d", self._empty), self._tasks
        self_projection, eps, least = guards
        call = self._pack(
            *self._shape, self_projection, torch.get_num_threads(), eps, least, scale, figures.buffer_info()[0],
            *chain.from_iterable(order), *map(Tensor.data_ptr, chain.from_iterable(rows)),
        )  # fmt: skip
        if status := self._run(call):
            raise _error("fpg_cpu_small_pcgrad", status)
        return lambda: abi.read_figures(torch.frombuffer(figures, dtype=torch.float64).view(-1, tasks))


def workspace_nbytes(tasks: int, widths: Sequence[int], dtype: torch.dtype, problems: int) -> int:
    """What the library takes, and the tables that it is given: addresses of the rows and of results, problems."""
    numbers = abi.indices(widths)
    size = _entry("fpg_cpu_workspace_blocks")(abi.address(numbers), len(widths), tasks, torch.get_num_threads())
    return int(size) + 8 * (tasks + 2) * len(widths)


def sign_sums(rows: Sequence[Tensor | None], weights: Sequence[float] | None, sums: Tensor) -> None:
    if not _are_dense(rows):
        return eager.sign_sums(rows, weights, sums)
    dtype = next((row.dtype for row in rows if row is not None), sums.dtype)
    numbers = None if weights is None else array("d", weights)
    given = (abi.places(rows), len(rows), sums.shape[1], abi.DTYPES[dtype])
    _call("fpg_cpu_sign_sums", *given, abi.address(numbers), sums.data_ptr())


def trimmed_mean(rows: Sequence[Tensor | None], trim: int, out: Tensor) -> None:
    if not _are_dense([*rows, out]):
        return eager.trimmed_mean(rows, trim, out)
    network = _network(len(rows)) if trim else array("i")
    given = (abi.places(rows), len(rows), len(out), abi.DTYPES[out.dtype])
    _call("fpg_cpu_trimmed_mean", *given, abi.address(network), len(network) // 2, trim, out.data_ptr())


def method_weights(name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None) -> Tensor | None:
    """None for many tasks, of which NumPy takes less time: never for projections, which it would make all at once."""
    largest = _LARGEST_BY_JACOBI if name in _BY_EIGENVALUES else _LARGEST_SOLVED
    if gram.shape[-1] > largest and name not in _PROJECTIONS:
        return None
    gram, numbers = gram.contiguous(), array("d", parameters)
    answers = abi.new_answers(name, gram)
    preferred = None if preference is None else preference.data_ptr()
    given = (*abi.solver(name, gram), abi.address(numbers), preferred)
    _call("fpg_cpu_method_weights", *given, answers.data_ptr())
    return answers


def gradvac(gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor) -> Tensor:
    gram, coefficients = gram.contiguous(), gram.new_empty(gram.shape)
    _call("fpg_cpu_gradvac", *abi.gradvac(gram, places, beta, eps, targets), coefficients.data_ptr())
    return coefficients


def permutations(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    """As ``variants.permutations`` where ``draws_as_torch``; the random bits of all in one call of the generator."""
    if size < 2:  # nothing is drawn
        return torch.zeros((count, size), dtype=torch.int64, device="cpu")
    found = _NUMBERS.new_empty(count, size)
    here = count - count * (size - 1) % 2  # 32 bits a place, of which the generator gives two at a time
    if here:
        bits = _NUMBERS.new_empty(here * (size - 1) // 2)
        bits.random_(-(2**63), None, generator=generator)
        _call("fpg_cpu_permutations", bits.data_ptr(), here, size, found.data_ptr())
    if here < count:
        found[here:] = variants.permutations(count - here, size, generator)
    return found


@cache
def draws_as_torch() -> bool:
    """Whether this torch draws permutations as the library does, and leaves its generator in the same state."""
    one, other = (torch.Generator("cpu").manual_seed(1) for _ in range(2))
    drawn = permutations(5, 8, one), variants.permutations(5, 8, other)
    return torch.equal(*drawn) and torch.equal(one.get_state(), other.get_state())


def _are_dense(rows: Sequence[Tensor | None]) -> bool:
    return all(row is None or row.stride(0) == 1 for row in rows)


@cache
def _network(size: int) -> array[int]:
    """The sorting network as the library takes it: all low places, then all high ones."""
    pairs = sorting_network(size)
    return array("i", [low for low, _ in pairs] + [high for _, high in pairs])
