"""Batches of one task each: from a column of the data, or from a dict of datasets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import accumulate, chain, cycle, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

from .._tasks import index_of


class TaskDatasets(Dataset[Any]):
    """A dataset for each task, one after the other; each row knows its task.

    Args:
        datasets: by the names of their tasks; of known length, with rows that are mappings.
        key: what a row has the name of its task in.
    Raises:
        TypeError: one whose length is not known.
    """

    def __init__(self, datasets: Mapping[str, Any], key: str) -> None:
        for name, dataset in datasets.items():
            if not isinstance(dataset, Sized):
                raise TypeError(
                    f"train_dataset[{name!r}] has no length: batches of one task are drawn by index; give one dataset "
                    f"whose batches hold one task each, with a column {key!r}"
                )
        self.names, self._datasets, self._key = tuple(datasets), list(datasets.values()), key
        self._ends = list(accumulate(map(len, self._datasets)))
        self.tasks = list(chain.from_iterable([name] * len(dataset) for name, dataset in datasets.items()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        t = bisect_right(self._ends, index)
        return {**self._datasets[t][index - (self._ends[t - 1] if t else 0)], self._key: self.names[t]}


def tasks_of_rows(dataset: Any, key: str) -> list[Any] | None:
    """The task of each row, as the data have it; None where rows have none, or are not known beforehand."""
    if isinstance(dataset, TaskDatasets):
        return dataset.tasks
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    if hasattr(dataset, "column_names"):
        return [plain(value) for value in dataset[key]] if key in dataset.column_names else None
    first = dataset[0]
    if not isinstance(first, Mapping) or key not in first:
        return None
    return [plain(dataset[i][key]) for i in range(len(dataset))]


def plain(value: Any) -> Any:
    """A tensor's or an array's one element as a number."""
    return value.item() if hasattr(value, "item") else value


def names_in(values: Iterable[Any]) -> Sequence[str] | int:
    """The tasks that rows have: names in alphabetical order, or how many indices."""
    found = set(values)
    if all(isinstance(value, str) for value in found):
        return sorted(found)
    if any(isinstance(value, bool) or not isinstance(value, int) for value in found):
        raise TypeError(f"tasks of rows must be all names or all indices; found {sorted(map(repr, found))[:5]}")
    return 1 + max(found)


class TaskBatchSampler(BatchSampler):
    """Batches of one task each, in the order in which a sampler fills them.

    Where each batch of the sampler's holds one task already, they are those batches. Else a row waits for others of its
    task; at the end of an epoch what waits becomes smaller batches. Where the sampler draws another number of rows than
    there are, it goes on until there are as many full batches as it would have made.

    Several processes have the parts of what one has in a larger batch: of each group of as many batches, which are of
    one task and of one size, the first is the first process', and so on. Where rows at the end of an epoch cannot be
    shared out evenly, the first ones of their group come twice.

    Args:
        sampler: gives indices of rows; in all processes the same.
        tasks: the index of each row's task.
        batch_size: of one process.
        drop_last: leave the smaller batches at the end out.
        processes: how many there are.
    """

    def __init__(
        self, sampler: Sampler[int], tasks: Sequence[int], batch_size: int, drop_last: bool, processes: int = 1
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._tasks, self._rows, self._processes = tasks, batch_size * processes, processes
        if processes > 1:
            self.batch_size: Any = None  # by which Accelerate's loaders know that a batch may be of any length

    def __iter__(self) -> Iterator[list[int]]:
        for group in self._groups():
            share = -(-len(group) // self._processes)
            again = cycle(group)
            rows = [next(again) for _ in range(share * self._processes)]
            yield from (rows[start : start + share] for start in range(0, len(rows), share))

    def _groups(self) -> Iterator[list[int]]:
        """A batch of all processes together."""
        waiting: dict[int, list[int]] = {}
        once = self._draws_all_rows()
        left = self._number_of_groups()
        for index in self.sampler if once else chain.from_iterable(repeat(self.sampler)):
            own = waiting.setdefault(self._tasks[index], [])
            own.append(index)
            if len(own) == self._rows:
                yield waiting.pop(self._tasks[index])
                left -= 1
                if not left:
                    return
        if not self.drop_last:
            yield from waiting.values()

    def __len__(self) -> int:
        return self._processes * self._number_of_groups()

    def _number_of_groups(self) -> int:
        if not self._draws_all_rows():
            return max(1, len(self.sampler) // self._rows)  # type: ignore[arg-type]
        counts = [self._tasks.count(task) for task in set(self._tasks)]
        return sum(count // self._rows if self.drop_last else -(-count // self._rows) for count in counts)

    def _draws_all_rows(self) -> bool:
        return len(self.sampler) == len(self._tasks) and not getattr(self.sampler, "replacement", False)  # type: ignore[arg-type]


class TaskCollator:
    """A collator of rows of one task: it does not see the task, and the batch has it.

    Args:
        collator: of rows without ``key``.
        index: the index of what a row has in ``key``.
        as_tensor: the batch has it for each row, for a model that takes it; else once, on the host.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Any], key: str, index: Callable[[Any], int], *, as_tensor: bool
    ) -> None:
        self._collator, self._key, self._index, self._as_tensor = collator, key, index, as_tensor

    def __call__(self, rows: list[Any]) -> Any:
        task = one_task([self._index(plain(row[self._key])) for row in rows], self._key)
        batch = self._collator([{k: value for k, value in row.items() if k != self._key} for row in rows])
        batch[self._key] = torch.full((len(rows),), task) if self._as_tensor else task
        return batch


def one_task(tasks: Any, key: str) -> Any:
    """What all rows of a micro-batch have for their task.

    Raises:
        ValueError: they have several.
    """
    values = tasks.flatten().tolist() if isinstance(tasks, Tensor) else tasks
    found = {values} if isinstance(values, str | int) else set(map(plain, values))
    if len(found) != 1:
        raise ValueError(
            f"a micro-batch must hold one task; found {sorted(map(str, found))} in {key!r}: leave the batches to the "
            "trainer, which makes those of one task, or use a sampler that does; or give the losses of all tasks by "
            "task_losses({...})"
        )
    return found.pop()


def indices_of(values: Iterable[Any], count: int, names: tuple[str, ...]) -> list[int]:
    known = {value: index_of(value, count, names) for value in set(values)}
    return [known[value] for value in values]
