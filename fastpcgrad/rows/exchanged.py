"""Rows of tasks that processes share out among them: each has its part of all, of what every process has run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ..distributed.links import Link
from .sharded import ShardedGradients, fingerprint, store_part
from .task_gradients import Row, TaskGradients


class ExchangedGradients(ShardedGradients):
    """Rows of tasks whose backward passes are shared out among processes: those of this one are kept whole until a
    merge, where each process gets its shard of all.

    A task that several have run is the mean over them; with ``mean`` that over all stays in it, wherever they were.

    Args:
        parameters, dtype, link: see ``ShardedGradients``.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype | None, link: Link) -> None:
        super().__init__(parameters, dtype, link, answers=link.size)
        self._held = TaskGradients(parameters)
        self._unseen: Sequence[Tensor] = parameters  # until it is known that they are alike in all processes

    @property
    def tasks(self) -> list[int]:
        """Those of this process; once rows were exchanged, all that any process has."""
        return super().tasks or self._held.tasks

    def most_held(self, tasks: int) -> tuple[int, int]:
        """See ``ShardedGradients``: where the tasks are shared out evenly, and the first ones are being exchanged."""
        return -(-tasks // self._link.size), min(tasks, self._link.size)

    def take(self, task: int) -> Row | None:
        """See ``TaskGradients``."""
        if self._rows:
            raise RuntimeError(f"task {task} was exchanged for a merge that failed: call merge() or discard() first")
        self._check_whole()
        return self._held.take(task)

    def keep(self, task: int, row: Row) -> None:
        """See ``TaskGradients``."""
        self._held.keep(task, row)

    def summary(self, tasks: int, mean: bool) -> tuple[object, ...]:
        """See ``TaskGradients``; which tasks a process has is its own."""
        return f"0 to {tasks - 1}", mean, self.digest

    def collect(self, tasks: int, mean: bool) -> None:
        """See ``TaskGradients``. All exchange what they have, each its first row, then each its second, and so on."""
        if self._rows:
            return
        self._check_whole()
        stays = self._all_stays(tasks)
        runners = [sum(map(bool, of_task)) for of_task in zip(*stays, strict=True)]
        divisors = list(map(sum, zip(*stays, strict=True))) if mean else runners
        there = {task: [False] * len(self.widths) for task, count in enumerate(runners) if count}
        shards: dict[int, list[Tensor]] = {}
        self.at_risk = True
        for turn in zip_longest(*([task for task, count in enumerate(own) if count] for own in stays)):
            row: Row = []
            if (own := turn[self._link.rank]) is not None:
                row = self._held.take(own) or []
                there[own] = [grad is not None for grad in row]
            adds = []
            for task in turn:
                adds.append(task in shards)
                if task is not None and task not in shards:
                    shards[task] = self._new_shards()  # only now, as rows that were exchanged are gone
            self._exchange(row, divisors[own or 0], [shards.get(task) for task in turn], adds)
        for task, parts in shards.items():
            self._keep_shards(task, parts, there[task])
        self._held.free()
        self.at_risk = False

    def _exchange(self, row: Row, divisor: int, shards: Sequence[list[Tensor] | None], adds: Sequence[bool]) -> None:
        """One row of each process that has one more.

        Args:
            row, divisor: of this process.
            shards: by rank, those of the task whose row comes from there; None: none comes.
            adds: by rank, whether it is added to what is there.
        """
        senders = [rank for rank, own in enumerate(shards) if own is not None]
        for place, vector in enumerate(self._vectors):

            def store(rank: int, part: Tensor, begin: int, place: int = place) -> None:
                store_part(adds[rank], shards[rank][place], part, begin)  # type: ignore[index]

            vector.buckets.each(senders, self._writer(row, vector, divisor), store)

    def _all_stays(self, tasks: int) -> list[list[int]]:
        """How often each process has entered each task: a list of all processes, by rank.

        Raises:
            RuntimeError: in the first round, where the parameters are not alike in all. Nothing would make them so.
        """
        own = torch.tensor([fingerprint(self._unseen), *map(self._held.stays, range(tasks))])
        everywhere = own.new_empty(self._link.size * len(own))
        self._link.gather(everywhere, own)
        found: list[list[int]] = everywhere.view(-1, len(own)).tolist()
        if len({numbers[0] for numbers in found}) > 1:
            raise RuntimeError(
                "processes that share tasks out have other parameters each: seed them alike, load one checkpoint, or "
                "wrap the model with DistributedDataParallel before the first round"
            )
        self._unseen = ()
        return [numbers[1:] for numbers in found]

    def _forget(self) -> None:
        self._held.clear()
        super()._forget()
        self._free = []  # in the next round there are the rows of this process before there are shards

    def free(self) -> None:
        """See ``TaskGradients``."""
        super().free()
        self._held.free()
