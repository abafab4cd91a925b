"""Vectors that processes of a group have, cut so that each keeps a part of their mean, or of each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
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
        self._room: list[tuple[Tensor, Tensor]] = []
        self._on_their_way: deque[tuple[Any, Callable[[], None]]] = deque()

    def before(self, column: int) -> int:
        """How many of the vector's columns before this one are in the shard of this process: where it begins there."""
        bucket, inside = divmod(column, self.width)
        return bucket * self.part + min(max(inside - self._link.rank * self.part, 0), self.part)

    def new_shard(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.count * self.part, dtype=dtype, device=self._device)

    def prepare(self) -> None:
        """Have all that a reduction takes: the first time with all processes together."""
        self._link.reducing(self._device)
        if not self._room:
            self._room = [
                (
                    torch.empty(self.width, dtype=self.dtype, device=self._device),
                    torch.empty(self._answers * self.part, dtype=self.dtype, device=self._device),
                )
                for _ in range(min(IN_FLIGHT, self.count))
            ]

    def reduce(
        self,
        number: int,
        write: Callable[[Tensor, int], None],
        store: Callable[[Tensor, int], None],
        *,
        waits: bool = True,
    ) -> bool:
        """Begin to reduce a bucket: all processes begin with the same ones, in the same order.

        Args:
            write: ``write(bucket, begin)`` puts the columns of this process' vector from ``begin`` on into a bucket,
                divided by the number of processes: so large sums do not overflow.
            store: ``store(part, begin)`` takes the columns of this process' shard of the mean from ``begin`` on. It is
                called by a later ``reduce``, or by ``finish``.
            waits: for room, until another bucket has arrived.
        Returns:
            whether there was room.
        """
        return self._begin(number, write, self._link.scatter_sum, store, waits)

    def catch_up(self, number: int) -> None:
        """Take part in the reduction of a bucket of which nothing is wanted, at once."""
        self.prepare()
        bucket, answer = self._room[number % len(self._room)]
        self._on_their_way.append((self._link.scatter_sum(answer, bucket), lambda: None))

    def each(
        self, senders: Sequence[int], write: Callable[[Tensor, int], None], store: Callable[[int, Tensor, int], None]
    ) -> None:
        """This process' shard of the vector of each sender, bucket by bucket.

        Args:
            senders: the ranks of those that have a vector, ascending.
            write: see ``reduce``; is called where this process is one of them.
            store: ``store(rank, part, begin)`` takes the columns from ``begin`` on of the shard of a sender's vector.
        """
        counts = [self.part if rank in senders else 0 for rank in range(self._link.size)]
        own = [counts[self._link.rank]] * self._link.size

        def send(answer: Tensor, bucket: Tensor) -> Any:
            return self._link.exchange(answer[: sum(counts)], counts, bucket[: sum(own)], own)

        def keep(answer: Tensor, begin: int) -> None:
            for rank, part in zip(senders, answer.split(self.part), strict=False):
                store(rank, part, begin)

        for number in range(self.count):
            self._begin(number, write if self._link.rank in senders else nothing, send, keep, True)
        self.finish()

    def finish(self) -> None:
        """Wait for all that is on its way."""
        while self._on_their_way:
            self._end_first(True)

    def _begin(
        self,
        number: int,
        write: Callable[[Tensor, int], None],
        send: Callable[[Tensor, Tensor], Any],
        store: Callable[[Tensor, int], None],
        waits: bool,
    ) -> bool:
        """A bucket written and sent, while the one before it is on its way; False: there is no room."""
        self.prepare()
        if len(self._on_their_way) == len(self._room) and not self._end_first(waits):
            return False
        bucket, answer = self._room[number % len(self._room)]
        write(bucket, number * self.width)
        self._on_their_way.append((send(answer, bucket), partial(store, answer, number * self.part)))
        return True

    def _end_first(self, waits: bool) -> bool:
        """Whether the bucket that was sent first has arrived, whose answer is stored then."""
        if not (waits or self._on_their_way[0][0].is_completed()):
            return False
        work, store = self._on_their_way.popleft()
        work.wait()
        store()
        return True

    def whole(self, shard: Tensor) -> Tensor:
        """The vector of which each process gives its shard, and what is beyond its end."""
        whole = shard.new_empty(self.count * self.width)
        if self.count:
            for part, bucket in zip(shard.split(self.part), whole.split(self.width), strict=True):
                self._link.gather(bucket, part)
        return whole


def nothing(bucket: Tensor, begin: int) -> None:
    """To write into a bucket, or to keep of what came back for it."""
