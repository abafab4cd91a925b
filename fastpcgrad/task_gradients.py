"""The task gradients of a round: kept where autograd put them, one list of tensors a task."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, compress
from operator import attrgetter

import torch
from torch import Tensor

from ._ops import Blocks, addresses
from .functional import ROW_DTYPES

_DTYPE = attrgetter("dtype")

Row = list[Tensor | None]
"""One task's gradient of each parameter; None where it has none."""


class TaskGradients:
    """The rows of J, one a task, in blocks, one a parameter.

    Nothing is copied: a row is the tensors that a backward pass left, taken over from ``.grad``. A tensor that is not
    dense, not alone in its memory or of another dtype than the rows is replaced by a copy that is.

    On the CPU the rows of the last round are kept, and each is freed just before its successor is made: the new
    gradients then take over its memory, still mapped, instead of faulting in fresh pages.

    Args:
        parameters: tensors with the shapes, strides, dtype and device of the gradients; each once.
        dtype: of the rows; None: that of the parameters.
    Raises:
        TypeError: a dtype that gradients or rows cannot have.
        ValueError: parameters on several devices, or of several dtypes without ``dtype``.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or _common_dtype(parameters)
        self.device = _common_device(parameters)
        for found in (self.dtype, *(p.dtype for p in parameters)):
            if found not in ROW_DTYPES:
                raise TypeError(f"gradients must be float16, bfloat16, float32 or float64; found {found}")
        self.widths = array("q", (p.numel() for p in parameters))
        self._strides = [_gradient_stride(p) for p in parameters]
        self._sizes = [width * self.dtype.itemsize for width in self.widths]
        self._rows: dict[int, Row] = {}
        self._spent: list[Row] = []
        self._stays: dict[int, int] = {}  # how often a task was entered, of those entered again
        self._averaged = False

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return sum(self.widths) * self.dtype.itemsize

    @property
    def tasks(self) -> list[int]:
        """The tasks that have a row, ascending."""
        return sorted(self._rows)

    def take(self, task: int) -> Row | None:
        """Give a task's row away, for more to be added; None for a task that has none, which is about to get one.

        Raises:
            RuntimeError: the rows are averages by now, because a merge of them failed.
        """
        row = self._rows.get(task)
        if row is not None:
            if self._averaged:
                raise RuntimeError(f"task {task} was averaged for a merge that failed: call merge() or discard() first")
            del self._rows[task]
            self._stays[task] = self._stays.get(task, 1) + 1
            places = addresses([grad for grad in row if grad is not None])
            # Autograd will add in place, for each parameter by itself.
            return row if len(set(places)) == len(places) else _apart(row)
        if self._stays:
            self._stays.pop(task, None)
        if self._spent:
            del self._spent[0]
        return None

    def put(self, task: int, row: Row) -> None:
        """Take a task's row over. What has a graph of its own (of ``create_graph=True``) loses it."""
        for index, grad in enumerate(row):
            if grad is not None and grad.requires_grad:
                row[index] = grad.detach()
        self._rows[task] = row

    def average(self) -> None:
        """Divide the row of each task that was entered several times by their number."""
        if not self._stays or self._averaged:
            return
        self.blocks()  # from here on each gradient is alone in its memory
        for task, times in self._stays.items():
            there = [grad for grad in self._rows.get(task, ()) if grad is not None]
            if there:
                torch._foreach_div_(there, times)
        self._averaged = True

    def blocks(self) -> Blocks:
        """J. Looked at here, all at once: right after a backward pass this code would find the caches cold.

        Raises:
            RuntimeError: a task's gradient lies where another task's lies: a backward pass has overwritten that one.
        """
        tasks = self.tasks
        rows = [self._plain(self._rows[task]) for task in tasks]
        pointers = [addresses(row) for row in rows]
        if _coincide(pointers):
            rows = [_apart(row) for row in rows]
            pointers = [addresses(row) for row in rows]
            _check_apart(tasks, pointers)
        self._rows = dict(zip(tasks, rows, strict=True))
        return Blocks(rows, pointers, self.widths, self.dtype, self.device)

    def clear(self) -> None:
        """Forget all rows."""
        if not self._rows:
            return
        self._spent = [self._rows[t] for t in self.tasks] if self.device.type == "cpu" else []
        self._rows, self._stays, self._averaged = {}, {}, False

    def free(self) -> None:
        """Forget all rows, and give the memory back at once."""
        self._rows, self._stays, self._averaged, self._spent = {}, {}, False, []

    def _plain(self, row: Row) -> Row:
        """The row, but copies of what is no dense tensor of its own with the rows' dtype.

        A row at a time, by functions that are not Python's: for many small parameters this is most of a surgery.
        """
        there = [grad for grad in row if grad is not None]
        sizes, strides = self._sizes, self._strides
        if len(there) < len(row):
            present = [grad is not None for grad in row]
            sizes, strides = list(compress(sizes, present)), list(compress(strides, present))
        if _need_no_copy(there, self.dtype, sizes, strides):
            return row
        return [
            grad
            if grad is None or _need_no_copy([grad], self.dtype, [size], [stride])
            else torch.empty_strided(grad.shape, stride, dtype=self.dtype, device=grad.device).copy_(dense(grad))
            for grad, size, stride in zip(row, self._sizes, self._strides, strict=True)
        ]


def _need_no_copy(
    grads: Sequence[Tensor], dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[tuple[int, ...]]
) -> bool:
    """Whether all are strided, of that dtype, and each fills a storage of so many bytes with those strides."""
    try:
        nbytes = list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, grads)))
    except NotImplementedError:  # what is not strided has no storage
        return False
    return nbytes == sizes and set(map(_DTYPE, grads)) <= {dtype} and list(map(Tensor.stride, grads)) == strides


def dense(grad: Tensor) -> Tensor:
    """Strided and outside of any graph (``create_graph=True`` gives gradients with a graph of their own)."""
    grad = grad.detach() if grad.requires_grad else grad
    return grad if grad.layout == torch.strided else grad.to_dense()


def _coincide(pointers: Sequence[Sequence[int]]) -> bool:
    """Whether two gradients lie at the same place."""
    taken = list(filter(None, chain.from_iterable(pointers)))
    return len(set(taken)) < len(taken)


def _check_apart(tasks: Sequence[int], pointers: Sequence[list[int]]) -> None:
    taken: set[int] = set()
    for task, where in zip(tasks, pointers, strict=True):
        distinct = set(where) - {0}
        if not taken.isdisjoint(distinct):
            raise RuntimeError(
                f"task {task}'s gradient lies in the memory of another task's: a backward pass returned a buffer "
                "that it uses again; let it return a clone"
            )
        taken |= distinct


def _apart(row: Row) -> Row:
    """A row whose parameters share a gradient (views of one tensor), with one for each."""
    seen: set[int] = {0}
    result: Row = []
    for grad, address in zip(row, addresses(row), strict=True):
        result.append(grad.clone() if grad is not None and grad.numel() and address in seen else grad)
        seen.add(address)
    return result


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


def _gradient_stride(parameter: Tensor) -> tuple[int, ...]:
    """A gradient has its parameter's strides (channels-last stays so) unless those leave gaps or overlap."""
    dense = parameter.stride() if _is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
    return tuple(dense)


def _is_dense(parameter: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(parameter.stride(), parameter.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
