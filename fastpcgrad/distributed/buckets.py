"""Vectors that all processes of a group have, cut so that each keeps a part of their mean."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .links import Link

NBYTES = 25 << 20
"""Of a bucket at most."""
IN_FLIGHT = 2
"""Buckets at once: one is written while the other is on its way."""


class Buckets:
    """A vector cut into buckets, each of which is cut into a part a process: its shard is its parts of all buckets.

    Args:
        length: of the vector, the same in all processes.
        dtype, device: of it.
        link: to the processes, over one group.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device, link: Link) -> None:
        self.dtype, self._device, self._link = dtype, device, link
        self._rank = torch.distributed.get_rank(link.groups[0])
        self.count = -(-length * dtype.itemsize // NBYTES)
        self.part = max(1, -(-length // max(1, self.count * link.size)))
        """Columns of a process' part of a bucket."""
        self.width = self.part * link.size
        """Columns of a bucket; the last ones of the last bucket may be beyond the vector's end."""
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Of the buckets that are there at once, and of their parts."""
        return min(IN_FLIGHT, self.count) * (self.width + self.part) * self.dtype.itemsize

    def before(self, column: int) -> int:
        """How many of the vector's columns before this one are in the shard of this process: where it begins there."""
        bucket, inside = divmod(column, self.width)
        return bucket * self.part + min(max(inside - self._rank * self.part, 0), self.part)

    def new_shard(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.count * self.part, dtype=dtype, device=self._device)

    def mean(self, write: Callable[[Tensor, int], None], store: Callable[[Tensor, int], None]) -> None:
        """This process' shard of the mean of all their vectors, bucket by bucket.

        Args:
            write: ``write(bucket, begin)`` puts the columns of this process' vector from ``begin`` on into a bucket,
                divided by the number of processes: so large sums do not overflow.
            store: ``store(part, begin)`` takes the columns of the shard from ``begin`` on.
        """
        if not self._waiting:
            self._waiting = [
                (
                    torch.empty(self.width, dtype=self.dtype, device=self._device),
                    torch.empty(self.part, dtype=self.dtype, device=self._device),
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
                bucket, part = self._waiting[number % len(self._waiting)]
                write(bucket, number * self.width)
                works.append(self._link.scatter_sum(part, bucket))

    def whole(self, shard: Tensor) -> Tensor:
        """The vector of which each process gives its shard, and what is beyond its end."""
        whole = shard.new_empty(self.count * self.width)
        if self.count:
            for part, bucket in zip(shard.split(self.part), whole.split(self.width), strict=True):
                self._link.gather(bucket, part)
        return whole
