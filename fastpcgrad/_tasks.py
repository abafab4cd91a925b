"""The names of tasks: what takes a task's index takes its name, what takes a list of losses a dict of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TaskNames = tuple[str, ...]
"""One for each task; empty where tasks have none and go by their index."""


def check_tasks(num_tasks: Any, tasks: Any) -> tuple[int, TaskNames]:
    """How many tasks there are, and their names.

    Args:
        num_tasks: T, or None where ``tasks`` says it.
        tasks: names, different ones; or T; or None where ``num_tasks`` says it.
    Raises:
        TypeError: both or neither, or names that are no strings.
        ValueError: no integer >= 1, no names, or one twice.
    """
    if (num_tasks is None) == (tasks is None):
        raise TypeError(f"give either num_tasks or tasks; found num_tasks={num_tasks!r} and tasks={tasks!r}")
    if num_tasks is not None or isinstance(tasks, int):
        argument, count = ("tasks", tasks) if num_tasks is None else ("num_tasks", num_tasks)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{argument} must be an integer >= 1; found {count!r}")
        return count, ()
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(name, str) for name in tasks):
        raise TypeError(f"tasks must be a list of names, or how many there are; found {tasks!r}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must be one name or more, each once; found {list(tasks)}")
    return len(tasks), tuple(tasks)


def check_names(names: TaskNames, found: Any) -> None:
    """ValueError where a state is of tasks with other names, or in another order; None or empty: they have none.

    Tasks may have come or gone at the end.
    """
    if any(name != own for name, own in zip(names, found or (), strict=False)):
        raise ValueError(
            f"the state is of the tasks {list(found)}, and these are {list(names)}: what is kept for each goes by its "
            "place, so give the names in the order that they had"
        )


def index_of(task: Any, count: int, names: TaskNames = ()) -> int:
    """The index of a task by its index or its name.

    Raises:
        IndexError: there is none.
    """
    if isinstance(task, str) and task in names:
        return names.index(task)
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < count:
        named = f", or one of the names {list(names)}" if names else ""
        raise IndexError(f"task index must be an integer in 0..{count - 1}{named}; found {task!r}")
    return task


def in_order(losses: Any, count: int, names: TaskNames = ()) -> Any:
    """A dict of losses by name, or by index, as the list that it stands for; a task that it lacks is absent. All else
    as it is.

    Raises:
        ValueError: a key that is none of the names.
        TypeError: one that is no index, where there are no names.
    """
    if isinstance(losses, list) or not isinstance(losses, Mapping):  # the first takes a tenth of the second
        return losses
    listed: list[Any] = [None] * count
    for key, loss in losses.items():
        try:
            listed[index_of(key, count, names)] = loss
        except IndexError:
            if names:
                raise ValueError(f"losses has the key {key!r}; the tasks have the names {list(names)}") from None
            raise TypeError(
                f"losses[{list(losses).index(key)}] must be a torch.Tensor; found {type(key).__name__}: of a dict. "
                f"Its keys, such as {key!r}, need the names that tasks=[...] gives"
            ) from None
    return listed
