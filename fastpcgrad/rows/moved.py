"""Rows of another dtype or on another device than the parameters: gradients arrive one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._blocks import addresses
from .._gradients import added, dense, gradient_dtype
from ..functional import ROW_DTYPES
from .columns import Columns
from .host import Copies, HostRows
from .sparse import stays_sparse
from .task_gradients import Row, TaskGradients


class MovedGradients(TaskGradients):
    """Rows that are copies: each gradient is converted, or sent to the host, as it arrives.

    Args:
        parameters: see ``TaskGradients``.
        dtype: of the rows; None: those of the parameters' gradients.
        accumulate_dtype: in which the gradients of one stay in a task add up, on the parameters' device, before they
            are rounded to the rows' dtype; None: in the rows themselves.
        copies: brings rows of one dtype from one device to host memory; None: they lie where the parameters are.
    Raises:
        TypeError: a dtype that gradients or rows cannot have.
        ValueError: ``accumulate_dtype`` does not hold every value of the rows' dtype; see ``TaskGradients``.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        dtype: torch.dtype | None,
        accumulate_dtype: torch.dtype | None = None,
        copies: Copies | None = None,
    ) -> None:
        super().__init__(parameters, dtype)
        self.accumulate_dtype = accumulate_dtype
        self._dtypes = list(map(gradient_dtype, parameters))
        self._host: HostRows | None = None
        if copies is not None:
            self.devices = [torch.device("cpu")] * len(parameters)
            row_dtype = self.dtypes[0] if self.dtypes else torch.float32
            self._host = HostRows(parameters, self._strides, row_dtype, copies)
        self._task = -1
        self._row: Row = []
        self._sums: Row = []

    @property
    def on_host(self) -> bool:
        """Whether the rows lie in host memory, away from the parameters."""
        return self._host is not None

    def open(self, task: int) -> None:
        """From here on gradients are those of ``task``."""
        if self._host is not None:
            self._host.join()
        self._task = task
        self._row = self.take(task) or self._nothing()
        self._sums = self._nothing()

    def add(self, index: int, grad: Tensor) -> None:
        """Add one parameter's gradient, of any dtype, to the open row."""
        there, total = self._row[index], self._sums[index]
        if self._host is None and any(own is not None and stays_sparse(own) for own in (grad, there, total)):
            return self._add_sparse(index, grad)
        grad = dense(grad)
        if total is not None:
            total.add_(grad)
        elif self.accumulate_dtype is not None:
            self._row[index] = None
            if there is None:
                self._sums[index] = self._copy(index, grad, self.accumulate_dtype)
            else:
                back = there if self._host is None else self._host.fetch(there)
                self._sums[index] = self._copy(index, back, self.accumulate_dtype).add_(grad)
        elif there is None:
            self._row[index] = self._store(index, grad)
        elif self._host is None:
            there.add_(grad.to(there.dtype))  # a sum of two dtypes would take two copies on the CPU
        else:
            self._host.add(there, grad)

    def _add_sparse(self, index: int, grad: Tensor) -> None:
        """The same where that gradient is sparse, or what it is added to."""
        self._some_are_sparse = True
        dtype = self.accumulate_dtype or self.dtypes[index]
        own = self._coalesced(grad, dtype) if stays_sparse(grad) else self._copy(index, dense(grad), dtype)
        there = self._sums[index]
        if there is None and (row := self._row[index]) is not None:
            there = row.to(dtype)
        own = own if there is None else added(there, own)
        if self.accumulate_dtype is None:
            self._row[index] = own
        else:
            self._row[index], self._sums[index] = None, own

    def close(self) -> None:
        """What arrived is the task's row."""
        for index in range(len(self._sums)):
            total, self._sums[index] = self._sums[index], None
            if total is not None:
                self._row[index] = self._store(index, total)
        self.put(self._task, self._row)
        self.drop()

    def drop(self) -> bool:
        """Forget what arrived; whether anything did."""
        found = any(grad is not None for grad in (*self._row, *self._sums))
        self._row, self._sums = [], []
        return found

    def average(self) -> None:
        """Divide the row of each task that was entered several times by their number."""
        if self._host is not None:
            self._host.wait()
        super().average()

    def snapshot(self) -> dict[str, Any]:
        """See ``TaskGradients``."""
        if self._host is not None:
            self._host.wait()
        return super().snapshot()

    def restore(self, snapshot: dict[str, Any]) -> None:
        """See ``TaskGradients``."""
        if self._host is not None:
            rows = {task: self._host.place(task, row) for task, row in snapshot["rows"].items()}
            snapshot = {**snapshot, "rows": rows}
        super().restore(snapshot)

    def keep(self, task: int, row: Row) -> None:
        """See ``TaskGradients``; every row is a copy, and so nobody else's."""
        self.put(task, row)

    def columns(self) -> Columns:
        """J. Every row is a copy, and so dense and alone in its memory."""
        self._check_whole()
        if self._host is not None:
            self._host.wait()
        tensors, touched = self._in_blocks([self._rows[task] for task in self.tasks])
        pointers = [addresses(row) for row in tensors]
        return self._columns(tensors, pointers, touched)

    def give(self, merged: Row) -> Iterator[Tensor | None]:
        """The merged gradient as the parameters have it; the rows of each are freed before that of the next is made.

        Args:
            merged: for each parameter a tensor of dtype and device of the rows; None is left in its place.
        """
        for index, dtype in enumerate(self._dtypes):
            for row in self._rows.values():
                row[index] = None
            own, merged[index] = merged[index], None
            if own is not None and self._host is not None:
                own = self._host.fetch(own)
            own = None if own is None else own.to(dtype)
            yield own

    def clear(self) -> None:
        """Forget all rows, and give the memory back at once: to save memory is what such rows are for."""
        if self._host is not None:
            self._host.forget()
        self.free()

    def _check_whole(self) -> None:
        self.at_risk |= self._host is not None and self._host.at_risk
        super()._check_whole()

    def _nothing(self) -> Row:
        return [None] * len(self._strides)

    def _store(self, index: int, grad: Tensor) -> Tensor:
        if self._host is not None:
            return self._host.copy(self._task, index, grad)
        if stays_sparse(grad):
            return self._coalesced(grad, self.dtypes[index])
        return self._copy(index, grad, self.dtypes[index])

    def _copy(self, index: int, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(grad.shape, self._strides[index], dtype=dtype, device=grad.device).copy_(grad)


def check_accumulate_dtype(accumulate_dtype: torch.dtype, row_dtypes: Iterable[torch.dtype]) -> None:
    """TypeError or ValueError where sums in one dtype cannot become rows of the others."""
    if accumulate_dtype not in ROW_DTYPES:
        raise TypeError(f"accumulate_dtype must be float16, bfloat16, float32 or float64; found {accumulate_dtype}")
    for dtype in row_dtypes:
        if torch.promote_types(accumulate_dtype, dtype) != accumulate_dtype:
            raise ValueError(f"accumulate_dtype must hold every value of the rows' {dtype}; found {accumulate_dtype}")
