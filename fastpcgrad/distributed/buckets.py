"""Vectors that processes of a group have, cut so that each keeps a part of their mean, or of each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .links import Link

NBYTES = 25 << 20
"""Of a bucket at most."""
IN_FLIGHT = 2
"""Buckets at once: one is written while the other is on its way."""


class Cut:
    """A vector cut into buckets, each of which is cut into a part a process: its shard is its parts of all buckets.

    Args:
        length: of the vector, the same in all processes.
        itemsize: bytes of an element.
        size: how many processes there are.
        answers: how many parts come back for a bucket at most: one of a mean, or one of each process.
    """

    def __init__(self, length: int, itemsize: int, size: int, answers: int = 1) -> None:
        self._itemsize, self._answers = itemsize, answers
        self.count = -(-length * itemsize // NBYTES)
        self.part = max(1, -(-length // max(1, self.count * size)))
        """Columns of a process' part of a bucket."""
        self.width = self.part * size
        """Columns of a bucket; the last ones of the last bucket may be beyond the vector's end."""

    @property
    def nbytes(self) -> int:
        """Of the buckets that are there at once, and of what comes back for them."""
        return min(IN_FLIGHT, self.count) * (self.width + self._answers * self.part) * self._itemsize


class Buckets(Cut):
    """The buckets of vectors that processes have.

    Args:
        length, answers: see ``Cut``.
        dtype, device: of the vectors.
        link: to the processes, over one group.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device, link: Link, answers: int = 1) -> None:
        super().__init__(length, dtype.itemsize, link.size, answers)
        self.dtype, self._device, self._link = dtype, device, link
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def before(self, column: int) -> int:
        """How many of the vector's columns before this one are in the shard of this process: where it begins there."""
        bucket, inside = divmod(column, self.width)
        return bucket * self.part + min(max(inside - self._link.rank * self.part, 0), self.part)

    def new_shard(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.count * self.part, dtype=dtype, device=self._device)

    def mean(self, write: Callable[[Tensor, int], None], store: Callable[[Tensor, int], None]) -> None:
        """This process' shard of the mean of all their vectors, bucket by bucket.

        Args:
            write: ``write(bucket, begin)`` puts the columns of this process' vector from ``begin`` on into a bucket,
                divided by the number of processes: so large sums do not overflow.
            store: ``store(part, begin)`` takes the columns of the shard from ``begin`` on.
        """
        self._in_turn(write, self._link.scatter_sum, store)

    def each(
        self, senders: Sequence[int], write: Callable[[Tensor, int], None], store: Callable[[int, Tensor, int], None]
    ) -> None:
        """This process' shard of the vector of each sender, bucket by bucket.

        Args:
            senders: the ranks of those that have a vector, ascending.
            write: see ``mean``; is called where this process is one of them.
            store: ``store(rank, part, begin)`` takes the columns from ``begin`` on of the shard of a sender's vector.
        """
        counts = [self.part if rank in senders else 0 for rank in range(self._link.size)]
        own = [counts[self._link.rank]] * self._link.size

        def send(answer: Tensor, bucket: Tensor) -> Any:
            return self._link.exchange(answer[: sum(counts)], counts, bucket[: sum(own)], own)

        def keep(answer: Tensor, begin: int) -> None:
            for rank, part in zip(senders, answer.split(self.part), strict=False):
                store(rank, part, begin)

        self._in_turn(write if self._link.rank in senders else lambda bucket, begin: None, send, keep)

    def _in_turn(
        self,
        write: Callable[[Tensor, int], None],
        send: Callable[[Tensor, Tensor], Any],
        store: Callable[[Tensor, int], None],
    ) -> None:
        """Each bucket written, sent, and its answer stored, while the one after it is on its way."""
        if not self._waiting:
            self._waiting = [
                (
                    torch.empty(self.width, dtype=self.dtype, device=self._device),
                    torch.empty(self._answers * self.part, dtype=self.dtype, device=self._device),
                )
                for _ in range(min(IN_FLIGHT, self.count))
            ]
        works: deque[Any] = deque()
        for number in range(self.count + len(self._waiting)):
            if number >= len(self._waiting):
                done = number - len(self._waiting)
                works.popleft().wait()  # and not held: gloo's holds a copy of what was sent
                store(self._waiting[done % len(self._waiting)][1], done * self.part)
            if number < self.count:
                bucket, answer = self._waiting[number % len(self._waiting)]
                write(bucket, number * self.width)
                works.append(send(answer, bucket))

    def whole(self, shard: Tensor) -> Tensor:
        """The vector of which each process gives its shard, and what is beyond its end."""
        whole = shard.new_empty(self.count * self.width)
        if self.count:
            for part, bucket in zip(shard.split(self.part), whole.split(self.width), strict=True):
                self._link.gather(bucket, part)
        return whole
