"""The packed buffer: one row a task, one place a parameter, and who is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from ._native import prefer_huge_pages
from .functional import ROW_DTYPES

_ALIGNMENT = 64
"""Bytes: a cache line, and more than any vector load."""
_PAGE = 4096
_SKEW = 5 * _ALIGNMENT
"""Rows of a large buffer start this far apart modulo a page: rows a power of two apart would share cache sets."""


_REQUIRES_GRAD, _LAYOUT, _DENSE = attrgetter("requires_grad"), attrgetter("layout"), {torch.strided}


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a row: ``length`` elements from ``offset``, laid out with ``stride``."""

    offset: int
    length: int
    shape: torch.Size
    stride: tuple[int, ...]


class TaskGradients:
    """T task gradients as rows of one buffer J ``[T, N]``.

    Rows are filled in the order in which tasks come, so that J of a step with absent tasks is still one block of
    rows. Parameters whose size is a multiple of a cache line come first, the others behind them: every large
    view is aligned and there is no padding inside a row.

    Args:
        parameters: tensors with the shapes, strides, dtype and device of the gradients; each once.
        capacity: the number of rows.
        dtype: of the rows; None: that of the parameters.
    Raises:
        TypeError: a dtype that gradients or rows cannot have.
        ValueError: parameters on several devices, or of several dtypes without ``dtype``.
    """

    def __init__(self, parameters: Sequence[Tensor], capacity: int, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or _common_dtype(parameters)
        self.device = _common_device(parameters)
        for found in (self.dtype, *(p.dtype for p in parameters)):
            if found not in ROW_DTYPES:
                raise TypeError(f"gradients must be float16, bfloat16, float32 or float64; found {found}")
        self.places = _layout(parameters, self.dtype)
        self.by_offset = sorted(range(len(self.places)), key=lambda p: (self.places[p].offset, self.places[p].length))
        """The parameters in the order of their columns."""
        self.width = sum(place.length for place in self.places)
        self.row_stride = _row_stride(self.width, self.dtype)
        self.tasks: list[int] = []
        """The task of each filled row."""
        self._touched: list[bytearray] = []
        self._views: list[list[Tensor]] = []
        self._blocks: list[Tensor] = []
        self._capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer once it is allocated, at the first row."""
        return self._capacity * self.row_stride * self.dtype.itemsize

    @property
    def rows(self) -> Tensor:
        """J: the filled rows, ``[k, N]``. Parameters that a task did not touch are zero after ``close``."""
        return self._blocks[len(self.tasks)]

    def views(self, row: int) -> list[Tensor]:
        """The places of all parameters in one row, in the parameters' shapes."""
        return self._views[row]

    def touched(self, row: int) -> bytearray:
        """For each parameter 1 where the row's task has a gradient."""
        return self._touched[row]

    def open_row(self, task: int) -> int:
        """The row of a task, a new one the first time. Allocates the buffer on first use."""
        if task in self.tasks:
            return self.tasks.index(task)
        if not self._views:
            self._allocate()
        self.tasks.append(task)
        self._touched.append(bytearray(len(self.places)))
        return len(self.tasks) - 1

    def store(self, row: int, index: int, grad: Tensor) -> None:
        """Put one parameter's gradient into its place: copied the first time, added after that."""
        view, touched = self._views[row][index], self._touched[row]
        if touched[index]:
            view.add_(_plain(grad))
        else:
            view.copy_(_plain(grad))
            touched[index] = 1

    def store_all(self, row: int, grads: list[Any] | tuple[Any, ...]) -> None:
        """``store`` for all parameters, a gradient or None each; None leaves a parameter as it is."""
        touched = self._touched[row]
        whole = grads and not any(touched) and all(map(is_not, grads, repeat(None)))
        if whole and not any(map(_REQUIRES_GRAD, grads)) and set(map(_LAYOUT, grads)) == _DENSE:
            torch._foreach_copy_(self._views[row], grads)
            touched[:] = b"\1" * len(touched)
            return
        for index, grad in enumerate(grads):
            if grad is not None:
                self.store(row, index, grad)

    def close(self) -> bool:
        """Zero what tasks did not touch, once all rows are filled; says whether every task touched everything."""
        complete = True
        for views, touched in zip(self._views, self._touched, strict=False):
            if not all(touched):
                torch._foreach_zero_([view for view, there in zip(views, touched, strict=True) if not there])
                complete = False
        return complete

    def drop_row(self, row: int) -> None:
        """Forget a row, as if its task had been absent. The last row takes its place."""
        last = len(self.tasks) - 1
        if row != last:
            for p, there in enumerate(self._touched[last]):
                if there:
                    self._views[row][p].copy_(self._views[last][p])
            self.tasks[row], self._touched[row] = self.tasks[last], self._touched[last]
        del self.tasks[last], self._touched[last]

    def clear(self) -> None:
        """Forget all rows; the memory stays."""
        self.tasks, self._touched = [], []

    def _allocate(self) -> None:
        size = self._capacity * self.row_stride
        buffer = prefer_huge_pages(torch.empty(size, dtype=self.dtype, device=self.device))
        starts = [row * self.row_stride for row in range(self._capacity)]
        self._views = [
            [buffer.as_strided(place.shape, place.stride, start + place.offset) for place in self.places]
            for start in starts
        ]
        self._blocks = [
            buffer.as_strided((rows, self.width), (self.row_stride, 1)) for rows in range(self._capacity + 1)
        ]


def _plain(grad: Tensor) -> Tensor:
    """Dense and outside of any graph (``create_graph=True`` gives gradients with a graph of their own)."""
    grad = grad.detach() if grad.requires_grad else grad
    return grad if grad.layout == torch.strided else grad.to_dense()


def _common_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) > 1:
        raise ValueError(f"gradients of several dtypes cannot share a row; found {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop() if dtypes else torch.float32


def _common_device(parameters: Sequence[Tensor]) -> torch.device:
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"all parameters must be on one device; found {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else torch.device("cpu")


def _is_dense(parameter: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(parameter.stride(), parameter.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _layout(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Place]:
    quantum = _ALIGNMENT // dtype.itemsize
    places: list[Place | None] = [None] * len(parameters)
    offset = 0
    by_alignment = sorted(range(len(parameters)), key=lambda p: parameters[p].numel() % quantum != 0)
    for p in by_alignment:
        like = parameters[p]
        # A gradient has its parameter's strides (channels-last stays so) unless those leave gaps.
        shape = torch.Size(like.shape)
        stride = like.stride() if _is_dense(like) else torch.empty(shape, device="meta").stride()
        places[p] = Place(offset, like.numel(), shape, tuple(stride))
        offset += like.numel()
    return [place for place in places if place is not None]


def _row_stride(width: int, dtype: torch.dtype) -> int:
    size = width * dtype.itemsize
    size = -(-size // _ALIGNMENT) * _ALIGNMENT
    if size >= 16 * _PAGE:
        size = -(-size // _PAGE) * _PAGE + _SKEW
    return size // dtype.itemsize
