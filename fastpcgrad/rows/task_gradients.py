"""The task gradients of a round: kept where autograd put them, one list of tensors a task."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from .._blocks import addresses
from .._gradients import dense, gradient_dtype
from .._memory import are_alone, views_alone
from ..functional import ROW_DTYPES
from .columns import Columns
from .factors import Factors
from .factors import Row as Row
from .sparse import NOWHERE, Coalescing, Touched, in_blocks, stays_sparse

_OF_COMPLEX = (
    ": those of complex parameters are rows, of real and imaginary parts, in GradientSurgery and PCGrad alone, and not "
    "in two phases"
)
Kind = tuple[torch.dtype, bool]
"""The dtype of a gradient, and whether it has a graph of its own."""
_KIND = attrgetter("dtype", "requires_grad")
_REQUIRES_GRAD = attrgetter("requires_grad")


class TaskGradients:
    """The rows of J, one a task, in blocks, one a parameter.

    Nothing is copied: a row is the tensors that a backward pass left, taken over from ``.grad``. A tensor that is not
    dense, not alone in its memory, held by somebody else or of another dtype than the rows is replaced by a copy. One
    that is sparse is replaced by one that is coalesced.

    On the CPU the rows of the last round are kept, and each is freed just before its successor is made: the new
    gradients then take over its memory, still mapped, instead of faulting in fresh pages.

    Args:
        parameters: tensors with the shapes, strides, dtypes and devices of the gradients; each once.
        dtype: of the rows; None: those of the parameters' gradients.
    Raises:
        TypeError: a dtype that gradients or rows cannot have.
        ValueError: some parameters are on the meta device and some are not.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        dtypes = list(map(gradient_dtype, parameters))
        for found in dtypes if dtype is None else (dtype, *dtypes):
            if found not in ROW_DTYPES:
                remedy = _OF_COMPLEX if found.is_complex else ""
                raise TypeError(f"gradients must be float16, bfloat16, float32 or float64; found {found}{remedy}")
        self.dtypes = dtypes if dtype is None else [dtype] * len(dtypes)
        self.devices = [p.device for p in parameters]
        found_on = set(self.devices)
        if len(found_on) > 1 and any(device.type == "meta" for device in found_on):
            listed = ", ".join(sorted(map(str, found_on)))
            raise ValueError(f"tensors on the meta device have no memory, and the others have; found {listed}")
        self.widths = array("q", (p.numel() for p in parameters))
        self._strides = [_gradient_stride(p) for p in parameters]
        self._sizes = [width * own.itemsize for width, own in zip(self.widths, self.dtypes, strict=True)]
        self._kinds = [(own, False) for own in self.dtypes]
        self.may_keep = partial(_may_stay, self._sizes, self._strides, self._kinds, True)
        """Whether a row that was taken from ``.grad`` has no gaps, and is as rows are and nobody else's."""
        self.may_read = partial(_may_stay, self._sizes, self._strides, self._kinds, False)
        """The same of one that is read before anything else runs and not written: whoever may hold it."""
        self._rows: dict[int, Row] = {}
        self._own: set[int] = set()  # tasks whose row is known to be dense and nobody else's
        self._spent: list[Row] = []
        self._some_are_sparse, self._coalesced = False, Coalescing()
        self._stays: dict[int, int] = {}  # how often a task was entered, of those entered again
        self._averaged = False
        self._losses: dict[int, list[Tensor]] = {}
        self.factors: Factors | None = None
        """Those parameters of which the tasks' gradients are factors; a row may hold more for one."""
        self.at_risk = False
        """Whether rows are being written: where that was cut off, they are neither what they were nor merged."""

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return sum(self._sizes)

    @property
    def tasks(self) -> list[int]:
        """The tasks that have a row, ascending."""
        return sorted(self._rows)

    def take(self, task: int) -> Row | None:
        """Give a task's row away, for more to be added; None for a task that has none, which is about to get one.

        Raises:
            RuntimeError: the rows are averages by now, because a merge of them failed; or what wrote to them was cut
                off.
        """
        self._check_whole()
        row = self._rows.get(task)
        if row is not None:
            if self._averaged:
                raise RuntimeError(f"task {task} was averaged for a merge that failed: call merge() or discard() first")
            del self._rows[task]
            self._stays[task] = self._stays.get(task, 1) + 1
            return row
        if self._stays:
            self._stays.pop(task, None)
        if self._spent:
            del self._spent[0]
        return None

    def put(self, task: int, row: Row) -> None:
        """Let a task's row be read, as long as nothing writes to it. What has a graph of its own loses it."""
        self._own.discard(task)
        self._rows[task] = _detached(row)

    def keep(self, task: int, row: Row) -> None:
        """Take a task's row over, which was taken from ``.grad`` and of which the caller keeps no other reference.

        What somebody else holds, or its memory (a view, NumPy, a hook that saved it, another leaf's ``.grad``), is
        copied now: a later backward pass may write there, and a merge must not.
        """
        self._rows[task] = row if self.may_keep(row) else self._settled(row, alone=True)
        self._own.add(task)

    def row(self, task: int) -> Row:
        """A task's row, to look at."""
        return self._rows[task]

    def has_rows_of(self, index: int) -> bool:
        """Whether some task has a gradient of a parameter in its row."""
        return any(row[index] is not None for row in self._rows.values())

    def add_to(self, task: int, index: int, grad: Tensor) -> None:
        """Add to a task's gradient of one parameter, or take one over that is dense and nobody else's."""
        row = self._rows[task]
        there = row[index]
        row[index] = grad if there is None else there + grad

    def stays(self, task: int) -> int:
        """How often a task was entered."""
        return self._stays.get(task, 1) if task in self._rows else 0

    def note_loss(self, task: int, loss: Tensor) -> None:
        """The loss whose gradient a stay in a task brings."""
        self._losses.setdefault(task, []).append(loss.detach())

    def losses(self) -> dict[int, Tensor]:
        """Of each task whose loss was noted in every stay, the loss whose gradient its row is."""
        found = {}
        for task, noted in self._losses.items():
            if len(noted) == self.stays(task):
                total = sum(noted[1:], noted[0])
                found[task] = total / len(noted) if self._averaged else total
        return found

    def collect(self, tasks: int, mean: bool) -> None:
        """All rows of a round, before they are merged.

        Args:
            tasks: T.
            mean: divide the row of each task by how often it was entered.
        """
        if mean:
            self.average()

    def average(self) -> None:
        """Divide the row of each task that was entered several times by their number."""
        if not self._stays or self._averaged:
            return
        self._check_whole()
        self.at_risk = True
        for task, times in self._stays.items():
            there = [grad for grad in self._rows.get(task, ()) if grad is not None]
            if there:
                torch._foreach_div_(there, times)
        self._averaged = True
        self.at_risk = False

    def columns(self) -> Columns:
        """J. Looked at here, all at once: right after a backward pass this code would find the caches cold.

        Raises:
            RuntimeError: a task's gradient lies where another task's lies: a backward pass has overwritten that one.
        """
        self._check_whole()
        tasks = self.tasks
        kept = [self._rows[task] if task in self._own else self._settled(self._rows[task]) for task in tasks]
        rows, touched = self._in_blocks(kept)
        pointers = [addresses(row) for row in rows]
        if len(self._own) < len(tasks) and _coincide(pointers):
            rows = [_apart(row) for row in rows]
            pointers = [addresses(row) for row in rows]
            _check_apart(tasks, pointers)
        self._rows = dict(zip(tasks, kept if touched else rows, strict=True))
        return self._columns(rows, pointers, touched)

    def nothing(self, tasks: int) -> Columns:
        """J of tasks that have no gradient here."""
        empty: Row = [None] * len(self.dtypes)
        return self._columns([empty] * tasks, [[0] * len(empty)] * tasks)

    def _columns(
        self, rows: Sequence[Row], pointers: Sequence[Sequence[int]], touched: Mapping[int, Touched] = NOWHERE
    ) -> Columns:
        widths = self.widths
        if touched:
            widths = array("q", widths)
            for index, part in touched.items():
                widths[index] = part.width
        return Columns(rows, pointers, widths, self.dtypes, self.devices, touched)

    def _in_blocks(self, rows: list[Row]) -> tuple[list[Row], Mapping[int, Touched]]:
        return in_blocks(rows, self._strides) if self._some_are_sparse else (rows, NOWHERE)

    def summary(self, tasks: int, mean: bool) -> tuple[object, ...]:
        """What must be alike in all processes that have parts of the rows: tasks, stays, where there are gradients.

        Args:
            tasks, mean: see ``collect``.
        """
        there = [bytes(grad is not None for grad in self._rows[task]) for task in self.tasks]
        alike = repr((sorted(self._stays.items()), there)).encode()
        return *self.tasks, hashlib.blake2b(alike, digest_size=4).hexdigest()

    def snapshot(self) -> dict[str, Any]:
        """What a copy of this object needs to go on with the round, see ``restore``."""
        self._check_whole()
        return {
            "rows": dict(self._rows),
            "stays": dict(self._stays),
            "averaged": self._averaged,
            "some_are_sparse": self._some_are_sparse,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take up the rows of a copy's original; they are copies, too, and nobody else's."""
        for task, row in snapshot["rows"].items():
            self.keep(task, row)
        self._stays, self._averaged = snapshot["stays"], snapshot["averaged"]
        self._some_are_sparse = snapshot["some_are_sparse"]

    def clear(self) -> None:
        """Forget all rows."""
        if self._rows:
            on_host = all(device.type == "cpu" for device in self.devices)
            self._spent = [self._rows[t] for t in self.tasks] if on_host else []
        self._forget()

    def free(self) -> None:
        """Forget all rows, and give the memory back at once."""
        self._spent = []
        self._forget()

    def _forget(self) -> None:
        self._rows, self._stays, self._own, self._averaged, self.at_risk = {}, {}, set(), False, False
        self._losses = {}
        self.factors, self._some_are_sparse = None, False
        self._coalesced.forget()

    def _check_whole(self) -> None:
        if self.at_risk:
            raise RuntimeError("what wrote to the rows was cut off in the middle: call discard(), and fill them anew")

    def _settled(self, row: Row, *, alone: bool = False) -> Row:
        """The row, but copies of what is no dense tensor of its own with the rows' dtype.

        A row at a time, by functions that are not Python's: for many small parameters this is most of a surgery.

        Args:
            alone: copies also of what somebody else holds; the list is used up, for its references would count.
        """
        sizes, strides, kinds = self._sizes, self._strides, self._kinds
        present = [grad is not None for grad in row]
        there = [grad for grad in row if grad is not None]
        if len(there) < len(row):
            sizes, strides = list(compress(sizes, present)), list(compress(strides, present))
            kinds = list(compress(kinds, present))
        if alone:
            row.clear()
        if not _may_stay(sizes, strides, kinds, alone, there):
            there = list(map(Tensor.detach, there)) if any(map(_REQUIRES_GRAD, there)) else there
            # What came out of one collective shares memory, and may go on doing so.
            views = self._views(there, strides, kinds) if alone else set()
            there.reverse()
            expected = zip(sizes, strides, kinds, strict=True)
            there = [
                there.pop() if place in views else self._settled_one([there.pop()], *own, alone)
                for place, own in enumerate(expected)
            ]
        settled = iter(there)
        return [next(settled) if here else None for here in present]

    def _settled_one(self, one: list[Tensor], size: int, stride: tuple[int, ...], kind: Kind, alone: bool) -> Tensor:
        if _may_stay([size], [stride], [kind], alone, one):
            return one[0]
        dtype, _ = kind
        if stays_sparse(one[0]):
            self._some_are_sparse = True
            return self._coalesced(one[0], dtype)
        grad = dense(one[0])
        return torch.empty_strided(grad.shape, stride, dtype=dtype, device=grad.device).copy_(grad)

    def _views(self, grads: Sequence[Tensor], strides: Sequence[tuple[int, ...]], kinds: Sequence[Kind]) -> set[int]:
        """The places of those that may stay, each in a part of memory that they alone share."""
        if any(grad.layout != torch.strided for grad in grads):
            return set()
        fit = [g.stride() == stride and _KIND(g) == kind for g, stride, kind in zip(grads, strides, kinds, strict=True)]
        return {place for place in views_alone(grads) if fit[place]}


def _may_stay(
    sizes: Sequence[int],
    strides: Sequence[tuple[int, ...]],
    kinds: Sequence[Kind],
    alone: bool,
    grads: Sequence[Any],
) -> bool:
    """Whether all are there, strided, of those kinds, each fills a storage of so many bytes with those strides, and if
    asked nobody else holds any."""
    try:
        storages = list(map(Tensor.untyped_storage, grads))
    except (NotImplementedError, TypeError):  # what is not strided has no storage, nor has None
        return False
    return (
        list(map(UntypedStorage.nbytes, storages)) == sizes
        and list(map(Tensor.stride, grads)) == strides
        and list(map(_KIND, grads)) == kinds
        and (not alone or are_alone(grads, storages))
    )


def _detached(row: Row) -> Row:
    """The row without graphs of its own, which ``create_graph=True`` gives it."""
    for index, grad in enumerate(row):
        if grad is not None and grad.requires_grad:
            row[index] = grad.detach()
    return row


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


def _gradient_stride(parameter: Tensor) -> tuple[int, ...]:
    """A gradient has its parameter's strides (channels-last stays so) unless those leave gaps or overlap."""
    dense = (
        parameter.stride()
        if parameter.is_contiguous() or _is_dense(parameter)
        else torch.empty(parameter.shape, device="meta").stride()
    )
    return tuple(dense)


def _is_dense(parameter: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(parameter.stride(), parameter.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
