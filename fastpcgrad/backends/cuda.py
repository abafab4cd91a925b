"""The compiled CUDA library: pointers, sizes and the current stream in, a status out.

Work is queued on the current stream of the tensors' device; workspaces come from torch's allocator; nothing waits and
no value is read back, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._blocks import Blocks
from .._torch import raw_stream
from ..variants import Guards
from . import abi, eager, native
from .abi import BLOCKS, DTYPES, F64, I64, INT, POINTER, ROWS, SOLVE
from .stacked import combine_projected

_ARGUMENTS = {
    "fpg_cuda_gram": (*ROWS, POINTER, POINTER, POINTER),
    "fpg_cuda_pcgrad_coefficients": (POINTER, I64, I64, *SOLVE, POINTER, POINTER),
    "fpg_cuda_combine": (*ROWS, POINTER, POINTER, POINTER),
    "fpg_cuda_mix": (*ROWS, POINTER, POINTER),
    "fpg_cuda_pcgrad": (POINTER, POINTER),
    "fpg_cuda_workspace": (I64, I64, I64, INT),
    "fpg_cuda_method_weights": (INT, POINTER, I64, I64, *[POINTER] * 5),
    "fpg_cuda_method_workspace": (INT, I64, I64),
    "fpg_cuda_gradvac": (POINTER, POINTER, I64, I64, F64, F64, POINTER, POINTER, POINTER),
    "fpg_cuda_gram_blocks": (*BLOCKS, POINTER, I64, *[POINTER] * 3),
    "fpg_cuda_combine_blocks": (*BLOCKS, POINTER, I64, *[POINTER] * 4),
    "fpg_cuda_pcgrad_blocks": (*BLOCKS, POINTER, INT, INT, F64, F64, F64, *[POINTER] * 6),
    "fpg_cuda_workspace_blocks": (POINTER, I64, I64, INT, I64),
    "fpg_cuda_combine_workspace_blocks": (I64, I64, I64),
    "fpg_cuda_error": (INT,),
    "fpg_cuda_probe": (),
}
_RESULTS: dict[str, Any] = {
    "fpg_cuda_workspace": I64,
    "fpg_cuda_workspace_blocks": I64,
    "fpg_cuda_combine_workspace_blocks": I64,
    "fpg_cuda_method_workspace": I64,
    "fpg_cuda_error": ctypes.c_char_p,
}
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: MemoryError}

_SURGERY = struct.Struct("P4qPqP2q3d5Pq")
"""``fpg_cuda_surgery`` in csrc/fastpcgrad.h."""
_FOR_ALL, _PER_SEGMENT, _ON_HOST = 0, 1, 2
"""``fpg_order`` there."""
_LARGEST_GIVEN = 16
"""Tasks whose order the library takes from the host's memory, for all problems together."""

_LARGEST_SOLVED = 64
"""Tasks of a method's problem that one warp solves; each of its answers has T×T scratch memory twice."""
LARGEST_TASKS = 256
"""More rows than the kernels' shared memory holds: such a J goes to the eager backend."""

_PARTIALS_NBYTES = 64 << 20
"""Of partial Gram matrices, of which each block has one at least: more blocks come in groups, one after the other."""

AUTOMATIC, ONE_LAUNCH, SEVERAL_LAUNCHES = 0, 1, 2
launches = AUTOMATIC
"""How ``pcgrad`` and ``pcgrad_`` run: chosen by the size of J, or forced by tests and benchmarks. Same bits."""


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library`` with the types of its entry points declared; AttributeError where one is missing."""
    for name, arguments in _ARGUMENTS.items():
        entry = getattr(library, name)
        entry.argtypes, entry.restype = arguments, _RESULTS.get(name, ctypes.c_int)
    return library


def _load() -> ctypes.CDLL | None:
    library = native.library("cuda")
    return None if library is None else declare(library)


_library = _load()


def why_unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return "the CUDA library takes CUDA tensors only"
    if _library is None:
        return native.load_error("cuda")
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    status = int(_library.fpg_cuda_probe())
    return None if status == 0 else f"the CUDA library cannot run on this device: {_text(status)}"


def _entry(name: str) -> Any:
    return getattr(_library, name)


def _text(status: int) -> str:
    text: bytes = _entry("fpg_cuda_error")(status)
    return text.decode()


def _index(device: torch.device) -> int | None:
    """A CUDA device's number; None for the CPU, as the tests run these functions on an emulation."""
    index: int | None = device.index
    return torch.cuda.current_device() if index is None and device.type == "cuda" else index


def _stream(index: int | None) -> int:
    return 0 if index is None else raw_stream(index)


def _call(name: str, device: torch.device, *arguments: object) -> None:
    entry, index = getattr(_library, name), _index(device)
    # The library launches on the current device, which need not be the tensors'; to change to the same one is a cost.
    if index is None or index == torch.cuda.current_device():
        status = entry(*arguments, _stream(index))
    else:
        with torch.cuda.device(index):
            status = entry(*arguments, _stream(index))
    if status:
        raise _ERRORS.get(status, RuntimeError)(f"{name}: {_text(status)} (status {status})")


@lru_cache(1024)
def _packed_nbytes(library: Any, tasks: int, width: int, problems: int, dtype: torch.dtype) -> int:
    """Asked of the library once for each shape: a call of a foreign function takes longer than to look it up."""
    size: int = library.fpg_cuda_workspace(tasks, width, problems, DTYPES[dtype])
    return size + -size % 8


def _workspace(nbytes: int, device: torch.device) -> Tensor:
    """For one call: the allocator hands its memory on in the order of the stream."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    segments, device = abi.dense(segments), grads.device
    rows, result = abi.rows(grads, segments), _ops.new_gram(grads, segments)
    workspace = _workspace(_packed_nbytes(_library, *grads.shape, rows[-1], grads.dtype), device)
    _call("fpg_cuda_gram", device, *rows, result.data_ptr(), workspace.data_ptr())
    return result


def _order(order: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """An order as the library takes it, and where it lies. Who brings one from the host has looked for a capture."""
    if _is_on_host(order, device):
        if order.dim() == 2 and order.shape[0] <= _LARGEST_GIVEN:
            return order.contiguous(), _ON_HOST
        order = _ops.to_device(order, device, constant=True)
    return order.contiguous(), _FOR_ALL if order.dim() == 2 else _PER_SEGMENT


def _is_on_host(order: Tensor, device: torch.device) -> bool:
    return order.is_cpu and device.type == "cuda"


def pcgrad_coefficients(gram: Tensor, order: Tensor, guards: Guards) -> Tensor:
    tasks, gram = gram.shape[-1], gram.contiguous()
    order, kind = _order(order, gram.device)
    result = torch.empty_like(gram)
    if not gram.numel():
        return result
    _call(
        "fpg_cuda_pcgrad_coefficients",
        gram.device,
        gram.data_ptr(),
        tasks,
        gram.numel() // (tasks * tasks),
        order.data_ptr(),
        kind,
        *guards,
        result.data_ptr(),
    )
    return result


def method_weights(name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None) -> Tensor | None:
    """None above 64 tasks, of which a warp would take milliseconds."""
    if gram.shape[-1] > _LARGEST_SOLVED:
        return None
    gram, numbers = gram.contiguous(), array("d", parameters)
    answers = abi.new_answers(name, gram)
    if not gram.numel():
        return answers
    number, pointer, tasks, problems = abi.solver(name, gram)
    workspace = _workspace(_entry("fpg_cuda_method_workspace")(number, tasks, problems), gram.device)
    _call(
        "fpg_cuda_method_weights",
        gram.device,
        *(number, pointer, tasks, problems, abi.address(numbers)),
        None if preference is None else preference.data_ptr(),
        answers.data_ptr(),
        workspace.data_ptr(),
    )
    return answers


def gradvac(gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor) -> Tensor | None:
    if gram.shape[-1] > LARGEST_TASKS:
        return None
    gram, coefficients = gram.contiguous(), gram.new_empty(gram.shape)
    if gram.numel():
        given = abi.gradvac(gram, places, beta, eps, targets)
        _call("fpg_cuda_gradvac", gram.device, *given, coefficients.data_ptr())
    return coefficients


def combine(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    weights, segments = weights.contiguous(), abi.dense(segments)
    _call("fpg_cuda_combine", grads.device, *abi.rows(grads, segments), weights.data_ptr(), out.data_ptr())
    return None


def mix_(grads: Tensor, coefficients: Tensor, segments: Tensor | None) -> None:
    coefficients, segments = coefficients.contiguous(), abi.dense(segments)
    _call("fpg_cuda_mix", grads.device, *abi.rows(grads, segments), coefficients.data_ptr())
    return None


def pcgrad(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    scale: float,
    segments: Tensor | None,
    out: Tensor | None,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    """G, C and w; without ``out`` the rows are mixed in place and w is not written."""
    segments, device = abi.dense(segments), grads.device
    order, kind = _order(order, device)
    rows = _, tasks, width, _, _, _, problems = abi.rows(grads, segments)
    nbytes = _packed_nbytes(_library, tasks, width, problems, grads.dtype)
    if figures:
        found: tuple[Tensor, ...] = _ops.new_figures(grads, segments)
        workspace = _workspace(nbytes, device)
        memory = workspace.data_ptr()
        matrix, coefficients, weights = (tensor.data_ptr() for tensor in found)
    else:
        found, workspace = (), _workspace(nbytes + abi.figures_nbytes(tasks, problems), device)
        memory = workspace.data_ptr()
        matrix, coefficients, weights = abi.figures(memory + nbytes, tasks, problems)
    results = (0, 0) if out is None else (weights, out.data_ptr())
    call = _SURGERY.pack(
        *rows, order.data_ptr(), kind, *guards, scale, matrix, coefficients, *results, memory, launches
    )
    _call("fpg_cuda_pcgrad", device, call)
    return found


def pcgrad_(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    segments: Tensor | None,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    return pcgrad(grads, order, guards, 1.0, segments, None, figures)[:2]


def gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    tasks = len(blocks.tensors)
    most = _blocks_of_group(tasks)
    if len(blocks.widths) <= most:
        return _gram_blocks(blocks, problem_of, problems)
    result = torch.zeros((problems, tasks, tasks), dtype=torch.float64, device=blocks.device)
    for first in range(0, len(blocks.widths), most):
        chosen = slice(first, first + most)
        owners = [0] * len(blocks.widths[chosen]) if problem_of is None else problem_of[chosen]
        lowest, highest = min((p for p in owners if p >= 0), default=0), max(owners)
        if highest >= 0:
            own = [max(p - lowest, -1) for p in owners]
            result[lowest : highest + 1] += _gram_blocks(_group(blocks, chosen), own, highest + 1 - lowest)
    return result


def _blocks_of_group(tasks: int) -> int:
    return max(1, _PARTIALS_NBYTES // (4 * tasks * (tasks + 1)))


def _group(blocks: Blocks, chosen: slice) -> Blocks:
    return blocks._replace(
        tensors=[row[chosen] for row in blocks.tensors],
        pointers=[row[chosen] for row in blocks.pointers],
        widths=blocks.widths[chosen],
    )


def _gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    tasks = len(blocks.tensors)
    result = torch.empty((problems, tasks, tasks), dtype=torch.float64, device=blocks.device)
    owners = abi.indices(problem_of)
    workspace = _workspace(_workspace_blocks_nbytes(tasks, blocks.widths, blocks.dtype, problems), blocks.device)
    _call(
        "fpg_cuda_gram_blocks",
        blocks.device,
        *abi.blocks(blocks),
        abi.address(owners),
        problems,
        result.data_ptr(),
        workspace.data_ptr(),
    )
    return result


def combine_blocks(
    blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
) -> None:
    weights, count, owners = weights.contiguous(), weights.shape[0], abi.indices(weights_of)
    nbytes = _combine_workspace_nbytes(len(blocks.tensors), len(blocks.widths), count)
    workspace = _workspace(nbytes, blocks.device)
    _call(
        "fpg_cuda_combine_blocks",
        blocks.device,
        *abi.blocks(blocks),
        abi.address(owners),
        count,
        weights.data_ptr(),
        abi.places(out),
        workspace.data_ptr(),
    )
    return None


def pcgrad_blocks(
    blocks: Blocks,
    order: Tensor,
    guards: Guards,
    scale: float,
    out: Sequence[Tensor | None],
) -> _ops.Later:
    tasks = len(blocks.tensors)
    if len(blocks.widths) > _blocks_of_group(tasks):
        gram = gram_blocks(blocks, None, 1)[0]
        coefficients = pcgrad_coefficients(gram, order, guards)
        return combine_projected(combine_blocks, blocks, gram, coefficients, scale, out)
    order, kind = _order(order, blocks.device)
    # Apart from the workspace, which they would keep in memory.
    figures = torch.empty((2 * tasks + 1, tasks), dtype=torch.float64, device=blocks.device)
    workspace = _workspace(_workspace_blocks_nbytes(tasks, blocks.widths, blocks.dtype, 1), blocks.device)
    _call(
        "fpg_cuda_pcgrad_blocks",
        blocks.device,
        *abi.blocks(blocks),
        order.data_ptr(),
        kind,
        *guards,
        scale,
        *abi.figures(figures.data_ptr(), tasks, 1),
        abi.places(out),
        workspace.data_ptr(),
    )
    return lambda: abi.read_figures(figures)


def _workspace_blocks_nbytes(tasks: int, widths: array[int], dtype: torch.dtype, problems: int) -> int:
    size = _entry("fpg_cuda_workspace_blocks")(abi.address(widths), len(widths), tasks, DTYPES[dtype], problems)
    return int(size)


def _combine_workspace_nbytes(tasks: int, blocks: int, count: int) -> int:
    return int(_entry("fpg_cuda_combine_workspace_blocks")(blocks, tasks, count))


def workspace_nbytes(tasks: int, widths: Sequence[int], dtype: torch.dtype, problems: int) -> int:
    """What gram takes of the largest group, and its result where there are several; or combine's tables of all."""
    most, numbers = _blocks_of_group(tasks), array("q", widths)
    groups = [numbers[first : first + most] for first in range(0, len(numbers), most)]
    largest = max((_workspace_blocks_nbytes(tasks, group, dtype, problems) for group in groups), default=0)
    result = 8 * problems * tasks * tasks if len(groups) > 1 else 0
    return max(largest + result, _combine_workspace_nbytes(tasks, len(numbers), 2 * problems + 1))


sign_sums, trimmed_mean = eager.sign_sums, eager.trimmed_mean
