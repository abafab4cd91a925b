"""Rows of which each process keeps a part: means over all of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._blocks import addresses
from .._gradients import dense, gradient_dtype, gradient_nbytes
from .._memory import prefer_huge_pages
from .._ops import flat
from ..distributed.buckets import Buckets
from ..distributed.links import Link
from .columns import Columns
from .memory_plan import MemoryPlan, plan_sharded
from .task_gradients import Row, TaskGradients

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element, the integers that it is summed as: exactly, in whatever order."""


class _Vector(NamedTuple):
    """The gradients of one dtype on one device, one after the other.

    Attributes:
        indexes: of their parameters.
        begins: where each begins, and where the last one ends.
        buckets: how it is cut.
    """

    indexes: list[int]
    begins: list[int]
    buckets: Buckets

    def within(self, number: int) -> list[int]:
        """The parameters of which there is something in a bucket."""
        first = number * self.buckets.width
        last = first + self.buckets.width
        places = zip(self.indexes, self.begins, self.begins[1:], strict=False)
        return [index for index, begin, end in places if max(begin, first) < min(end, last)]


class _Turn(NamedTuple):
    """When which bucket leaves.

    Attributes:
        place: of its vector.
        number: of the bucket there.
        within: the parameters of which there is something in it.
    """

    place: int
    number: int
    within: list[int]


class ShardedGradients(TaskGradients):
    """Rows of which this process has its shard, of means over all processes: each is reduced when its task is left, or
    ahead of that, as far as its gradients are there.

    Buckets leave in one order, the same in all processes: that in which a backward pass comes to the parameters, if
    their own order is that of the forward pass. A parameter's part of a shard is an interval of its gradient as it lies
    in memory, and may be empty.

    Args:
        parameters, dtype: see ``TaskGradients``. Gradients are reduced in their own dtype.
        link: to those who have the same parameters, over one group.
        answers: see ``Buckets``.
    """

    def __init__(
        self, parameters: Sequence[Tensor], dtype: torch.dtype | None, link: Link, *, answers: int = 1
    ) -> None:
        super().__init__(parameters, dtype)
        self._link, self._shapes = link, [p.shape for p in parameters]
        alike = repr((list(map(tuple, self._shapes)), self._strides, self.dtypes))
        self.digest = hashlib.blake2b(alike.encode(), digest_size=4).hexdigest()
        """Of what must be alike in all processes."""
        self._vectors: list[_Vector] = []
        kinds = list(zip(map(gradient_dtype, parameters), self.devices, strict=True))
        for kind in dict.fromkeys(kinds):
            indexes = [index for index in reversed(range(len(kinds))) if kinds[index] == kind]
            begins = [0, *accumulate(self.widths[index] for index in indexes)]
            self._vectors.append(_Vector(indexes, begins, Buckets(begins[-1], *kind, link, answers)))
        self.widths = array("q", self.widths)  # from here on those of this process' part
        for vector in self._vectors:
            ends = list(map(vector.buckets.before, vector.begins))
            for index, begin, end in zip(vector.indexes, ends, ends[1:], strict=False):
                self.widths[index] = end - begin
        self._sizes[:] = [width * own.itemsize for width, own in zip(self.widths, self.dtypes, strict=True)]
        turns = [
            _Turn(place, number, vector.within(number))
            for place, vector in enumerate(self._vectors)
            for number in range(vector.buckets.count)
        ]
        self._turns = sorted(turns, key=lambda turn: -min(turn.within, default=-1))  # the last one may be empty
        self.begun = 0
        """How many buckets of an open task have left: of the first turns."""
        self._ahead: list[Tensor] = []  # the shards of these
        self._shards: dict[int, list[Tensor]] = {}
        self._there: dict[int, list[bool]] = {}
        self._free: list[list[Tensor]] = []
        self._before: tuple[list[Tensor], list[bool]] | None = None  # of a task that was entered again

    def most_held(self, tasks: int) -> tuple[int, int]:
        """How many tasks' whole gradients there are at most, and of how many there are shards then."""
        return 1, tasks

    def plan(self, tasks: int, parameters: Sequence[Tensor], problems: int) -> MemoryPlan:
        """Bytes of a round, see ``plan_sharded``; on all devices together."""
        whole, largest = sum(map(gradient_nbytes, parameters)), max(map(gradient_nbytes, parameters), default=0)
        waiting = sum(vector.buckets.nbytes for vector in self._vectors)
        return plan_sharded(
            tasks,
            parameters,
            self.dtypes,
            self.widths,
            whole=whole,
            most_held=self.most_held(tasks),
            largest=largest,
            buckets=waiting,
            problems=problems,
        )

    @property
    def turns(self) -> int:
        """How many buckets a row is reduced in."""
        return len(self._turns)

    def take(self, task: int) -> Row | None:
        """See ``TaskGradients``; a row that is there stays here, and what the stay brings is added to it."""
        self._before = None
        if super().take(task) is not None:
            self._before = self._shards.pop(task), self._there.pop(task)
        return None

    def prepare(self) -> bool:
        """Whether an open task may be reduced ahead: not one that was entered before, whose row is there. Nothing is
        left then to be allocated, or made with all processes together."""
        for vector in self._vectors:
            vector.buckets.prepare()
        return self._before is None

    def reduce_ahead(self, row: Row, are_there: Callable[[list[int]], bool]) -> list[list[int]]:
        """Begin to reduce the open task's buckets whose turn it is and whose gradients are there. Waits for nobody.

        Args:
            row: gradients, None for what is not there.
            are_there: whether all gradients of some parameters are in the row that are going to be.
        Returns:
            of each bucket that has left the parameters in it.
        """
        first = self.begun
        writers: list[Callable[[Tensor, int], None]] = []
        while self.begun < len(self._turns) and are_there(self._turns[self.begun].within):
            self._ahead = self._ahead or self._new_shards()
            writers = writers or self._writers(row)
            if not self._reduce(writers, self._ahead, adds=False, waits=False):
                break
        return [turn.within for turn in self._turns[first : self.begun]]

    def catch_up(self, begun: int) -> None:
        """See ``Ahead``."""
        for turn in self._turns[self.begun : begun]:
            self._vectors[turn.place].buckets.catch_up(turn.number)
            self.begun += 1

    def forget(self) -> None:
        """See ``Ahead``."""
        for vector in self._vectors:
            vector.buckets.finish()
        if self._ahead:
            self._free.append(self._ahead)
        self._ahead, self.begun = [], 0

    def put(self, task: int, row: Row) -> None:
        """See ``keep``."""
        self.keep(task, row)

    def keep(self, task: int, row: Row) -> None:
        """Reduce a task's gradients, or what has not left of them, together with all processes. They are read, and not
        held."""
        there, adds = [grad is not None for grad in row], self._before is not None
        if self._before is not None:
            (shards, before), self._before = self._before, None
            there = [a or b for a, b in zip(there, before, strict=True)]
        else:
            shards, self._ahead = self._ahead or self._new_shards(), []
        writers = self._writers(row)
        while self.begun < len(self._turns):
            self._reduce(writers, shards, adds, waits=True)
        self.forget()
        self._keep_shards(task, shards, there)

    def columns(self) -> Columns:
        """J, of which this process has a part; a gradient that any process has is there in all."""
        self._check_whole()
        tasks = self.tasks
        there = torch.tensor([self._there[task] for task in tasks], dtype=torch.uint8)
        present = self._link.max_(there).bool().tolist()
        rows: list[Row] = [
            [piece if here else None for piece, here in zip(self._rows[task], own, strict=True)]
            for task, own in zip(tasks, present, strict=True)
        ]
        return self._columns(rows, list(map(addresses, rows)))

    def whole(self, merged: Row) -> Row:
        """The merged gradient, of which each process has its part in the memory of its rows, all of it in all."""
        first = self.tasks[0]
        for own, new in zip(self._rows[first], merged, strict=True):
            if own is not None and new is not None and new is not own:
                own.copy_(new)
        result: Row = [None] * len(merged)
        for vector, shard in zip(self._vectors, self._shards[first], strict=True):
            whole = prefer_huge_pages(vector.buckets.whole(shard.to(vector.buckets.dtype)))
            for index, begin in zip(vector.indexes, vector.begins, strict=False):
                if merged[index] is not None:
                    result[index] = whole.as_strided(self._shapes[index], self._strides[index], begin)
        return result

    def summary(self, tasks: int, mean: bool) -> tuple[object, ...]:
        """See ``TaskGradients``; where there are gradients may differ."""
        return *self.tasks, repr(sorted(self._stays.items()))

    def snapshot(self) -> dict[str, Any]:
        """See ``TaskGradients``."""
        if self.tasks:
            raise RuntimeError("rows that several processes share cannot be copied within a round: merge or discard")
        return super().snapshot()

    def _forget(self) -> None:
        self._free += self._shards.values()
        self._shards, self._there, self._before = {}, {}, None
        super()._forget()

    def clear(self) -> None:
        """Forget all rows; their memory is for those of the next round."""
        self._forget()

    def free(self) -> None:
        """See ``TaskGradients``."""
        super().free()
        self._free = []

    def _reduce(
        self, writers: Sequence[Callable[[Tensor, int], None]], shards: Sequence[Tensor], adds: bool, waits: bool
    ) -> bool:
        """Whether there was room for the bucket whose turn it is."""
        place, number, _ = self._turns[self.begun]
        store = partial(store_part, adds, shards[place])
        is_begun = self._vectors[place].buckets.reduce(number, writers[place], store, waits=waits)
        self.begun += is_begun
        return is_begun

    def _keep_shards(self, task: int, shards: list[Tensor], there: list[bool]) -> None:
        self._shards[task], self._there[task] = shards, there
        self._rows[task] = self._pieces(shards)
        self._own.add(task)

    def _new_shards(self) -> list[Tensor]:
        """For a task: those of an earlier round, if there are any."""
        if self._free:
            return self._free.pop()
        return [vector.buckets.new_shard(self.dtypes[vector.indexes[0]]) for vector in self._vectors]

    def _writers(self, row: Row) -> list[Callable[[Tensor, int], None]]:
        """Of its mean, by the place of the vector."""
        return [self._writer(row, vector, self._link.size) for vector in self._vectors]

    def _writer(self, row: Row, vector: _Vector, divisor: int) -> Callable[[Tensor, int], None]:
        """What puts a row's columns of one vector into a bucket, divided; see ``Buckets.reduce``."""

        @lru_cache(maxsize=1)  # a copy, where it is one, of one gradient at a time
        def columns_of(index: int) -> Tensor:
            return self._in_order(index, row[index])

        def write(bucket: Tensor, first: int) -> None:
            last = first + len(bucket)
            for index, begin, end in zip(vector.indexes, vector.begins, vector.begins[1:], strict=False):
                low, high = max(begin, first), min(end, last)
                if low < high:
                    place = bucket[low - first : high - first]
                    if row[index] is None:
                        place.zero_()
                    else:
                        torch.div(columns_of(index)[low - begin : high - begin], divisor, out=place)

        return write

    def _in_order(self, index: int, grad: Any) -> Tensor:
        """A gradient's elements in the order of its parameter's memory."""
        grad, stride = dense(grad), self._strides[index]
        if grad.stride() != stride:
            grad = torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
        return flat(grad)

    def _pieces(self, shards: Sequence[Tensor]) -> Row:
        """For each parameter its part of a shard."""
        row: Row = [None] * len(self.widths)
        for vector, shard in zip(self._vectors, shards, strict=True):
            begin = 0
            for index in vector.indexes:
                row[index] = shard[begin : begin + self.widths[index]]
                begin += self.widths[index]
        return row


def store_part(adds: bool, shard: Tensor, part: Tensor, first: int) -> None:
    """Columns of a shard from ``first`` on, or what is added to them."""
    place = shard[first : first + len(part)]
    place.add_(part) if adds else place.copy_(part)


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number of 62 bits that depends on every bit of the tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        bits = flat(tensor.detach().contiguous()).view(_BITS[tensor.dtype.itemsize])
        digest.update(repr(int(bits.sum(dtype=torch.int64))).encode())
    return int.from_bytes(digest.digest(), "big") >> 2
