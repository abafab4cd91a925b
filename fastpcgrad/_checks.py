"""What the functions on packed rows refuse: arguments of a wrong kind, and memory that is read after it is written.

``functional`` asks before it calls a kernel. Where a call goes through the dispatcher (compiled code, a tracer, an op
called by its name) ``check_arguments`` looks at its tensors, real or fake: kernels check nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ._modes import is_batched, is_fake
from ._torch import transforms_active

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(given: Mapping[str, Any], written: str | None) -> None:
    """Everything that the kernel of an op relies on, but for what shares memory (``check_apart``, ``check_out``).

    Args:
        given: the op's arguments, by the names in its schema.
        written: the one that the op overwrites.
    """
    segments = given.get("segments")
    if "grads" in given:
        rows = given["grads"]
        check_rows(rows)
        tasks, device = rows.shape[0], rows.device
        if segments is not None:
            check_segments(segments, rows)
        problems = None if segments is None else segments.shape[0] - 1
        if written == "grads":
            check_separate_rows(rows)
        if written == "out":
            check_out_kind(given["out"], rows)
        for name, shape in (("weights", (tasks,)), ("coefficients", (tasks, tasks))):
            if name in given:
                check_matrix(name, given[name], rows, problems, shape)
    else:
        gram = given["gram"]
        check_gram(gram)
        tasks, device, problems = gram.shape[-1], gram.device, gram.shape[0] if gram.dim() == 3 else None
    if "order" in given:
        check_guards(given["eps"], given["min_squared_norm"])
        check_order(given["order"], tasks, problems, device)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; found {type(value).__name__}")


def check_rows(grads: Tensor) -> None:
    check_tensor("grads", grads)
    if grads.layout != torch.strided:
        raise ValueError(f"grads must be dense; found layout {grads.layout}")
    if grads.dtype not in ROW_DTYPES:
        raise TypeError(f"grads must be float16, bfloat16, float32 or float64; found {grads.dtype}")
    shape = grads.shape
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"grads must be [T, N] with T >= 1 task gradients; found {list(shape)}")
    # Under vmap the strides are of no consequence: what is batched is computed by torch.
    if shape[1] > 1 and grads.stride(1) != 1 and not transforms_active():
        raise ValueError(f"the rows of grads must be contiguous; found strides {grads.stride()}")


def check_separate_rows(grads: Tensor) -> None:
    tasks, width = grads.shape
    if tasks > 1 and grads.stride(0) < width:
        raise ValueError(f"grads has overlapping rows and would be overwritten; strides {grads.stride()}")


def check_gram(gram: Tensor) -> None:
    check_tensor("gram", gram)
    if gram.dtype != torch.float64:
        raise TypeError(f"gram must be float64; found {gram.dtype}")
    if gram.dim() not in (2, 3) or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram must be [T, T] or [S, T, T] with T >= 1; found {list(gram.shape)}")


def check_matrix(name: str, value: Tensor, grads: Tensor, problems: int | None, shape: tuple[int, ...]) -> None:
    check_tensor(name, value)
    if value.dtype != torch.float64:
        raise TypeError(f"{name} must be float64; found {value.dtype}")
    expected = shape if problems is None else (problems, *shape)
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must be {list(expected)} for grads {list(grads.shape)}; found {list(value.shape)}")
    if value.device != grads.device:
        raise ValueError(f"{name} must be on {grads.device}, as grads; found {value.device}")


def check_guards(eps: float, min_squared_norm: float) -> None:
    if not eps >= 0 or not min_squared_norm >= 0:
        raise ValueError(
            f"eps and min_squared_norm must not be negative; found eps={eps}, min_squared_norm={min_squared_norm}"
        )


def check_segments(segments: Tensor, grads: Tensor) -> None:
    """Offsets on a GPU are taken as they are: to look at them would stop the stream."""
    check_segments_kind(segments)
    if segments.device != grads.device:
        raise ValueError(f"segments must be on {grads.device}, as grads; found {segments.device}")
    if is_readable(segments):
        check_offsets(segments.tolist(), grads.shape[1])


def check_segments_kind(segments: Tensor) -> None:
    if segments.dtype != torch.int64 or segments.dim() != 1 or segments.shape[0] < 2:
        raise ValueError(
            f"segments must be int64 offsets [S + 1] with S >= 1; found {segments.dtype} {list(segments.shape)}"
        )


def check_offsets(values: Sequence[int], width: int) -> None:
    if len(values) < 2 or values[0] != 0 or values[-1] != width or values != sorted(values):
        shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
        raise ValueError(f"segments must be non-decreasing offsets from 0 to N={width}; found {shown}")


def check_order(order: Tensor, tasks: int, problems: int | None, device: torch.device) -> None:
    check_tensor("order", order)
    shape = tuple(order.shape)
    if order.dtype != torch.int64 or (shape != (tasks, tasks) and shape != (problems, tasks, tasks)):
        allowed = [[tasks, tasks]] if problems is None else [[tasks, tasks], [problems, tasks, tasks]]
        raise ValueError(
            f"order must be int64 {' or '.join(map(str, allowed))}; found {order.dtype} {list(order.shape)}"
        )
    if order.device != device:
        raise ValueError(f"order must be on {device}, as the gradients; found {order.device}")
    if is_readable(order):
        wanted = list(range(tasks))
        for row in order.reshape(-1, tasks).tolist():
            if sorted(row) != wanted:
                raise ValueError(f"each row of order must be a permutation of 0..{tasks - 1}; found {row}")


def is_readable(indices: Tensor) -> bool:
    """Whether numbers can be looked at without a wait for a GPU, and there are any: not while code is compiled."""
    compiled = torch.compiler.is_compiling()
    return not compiled and indices.is_cpu and not is_fake(indices) and not is_batched(indices)


def check_out_kind(out: Tensor, grads: Tensor) -> None:
    check_tensor("out", out)
    if out.dtype != grads.dtype or out.device != grads.device:
        raise ValueError(f"out must be {grads.dtype} on {grads.device}, as grads; found {out.dtype} on {out.device}")
    if out.shape != grads.shape[1:] or (out.numel() > 1 and out.stride(0) != 1):
        raise ValueError(
            f"out must be contiguous [{grads.shape[1]}]; found {list(out.shape)} with strides {out.stride()}"
        )


# What shares memory. Addresses, not storages: two storages may lie in the same memory.


def check_apart(name: str, written: Tensor, *read: Tensor | None) -> None:
    """ValueError where a small tensor lies in what is written while it is still read.

    Args:
        name: of ``written``: rows or one row.
        read: weights, coefficients, segments, orders.
    """
    first, last = written.data_ptr(), _end(written)
    for tensor in read:
        if tensor is None or tensor.data_ptr() >= last or _end(tensor) <= first:
            continue
        if _meet(_runs(written), _runs(tensor)):
            raise ValueError(
                f"{name} shares memory with a tensor {list(tensor.shape)} of {tensor.dtype} that is read after {name} "
                "is written: give a clone of it"
            )


def check_out(out: Tensor, grads: Tensor) -> None:
    """ValueError where ``out`` shares memory with a row of ``grads`` but is not that row."""
    first, last = out.data_ptr(), _end(out)
    if grads.data_ptr() >= last or _end(grads) <= first:
        return
    nbytes, stride = last - first, grads.stride(0) * grads.element_size()
    starts = [grads.data_ptr() + t * stride for t in range(grads.shape[0])]
    others = [(start, start + nbytes) for start in starts if start != first]
    if _meet([(first, last)], others):
        raise ValueError(
            "out overlaps rows of grads that it is not: they would be read after it is written. It may be one row "
            "that shares no memory with others"
        )


def _end(tensor: Tensor) -> int:
    """The address behind the last element, if there is one."""
    if tensor.is_contiguous():  # most are, and the loop is a cost
        return tensor.data_ptr() + tensor.nbytes
    last = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * stride
    return tensor.data_ptr() + last * tensor.element_size()


def _runs(tensor: Tensor) -> list[tuple[int, int]]:
    """The first and the last address of each contiguous piece."""
    if not tensor.numel():
        return []
    shape, strides, length = list(tensor.shape), list(tensor.stride()), 1
    while shape and (shape[-1] == 1 or strides[-1] == length):
        length *= shape.pop()
        strides.pop()
    start, size = tensor.data_ptr(), tensor.element_size()
    steps = product(
        *(range(0, n * stride, stride) if stride else (0,) for n, stride in zip(shape, strides, strict=True))
    )
    return [(start + sum(step) * size, start + (sum(step) + length) * size) for step in steps]


def _meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    """Whether a range of one list shares an address with one of the other."""
    ends = [0, 0]
    for first, last, owner in sorted([(*run, 0) for run in some] + [(*run, 1) for run in others]):
        if first < ends[1 - owner]:
            return True
        ends[owner] = max(ends[owner], last)
    return False
