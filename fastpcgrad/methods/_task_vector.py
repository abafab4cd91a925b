"""One number a task, as the constructors of methods take it: preferences, weights, leaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TaskVector = Tensor | Sequence[float]


def task_vector(name: str, values: TaskVector) -> Tensor:
    """``values`` as a float64 tensor ``[T]`` on the CPU, a copy.

    Raises:
        TypeError: no tensor and no sequence of numbers.
        ValueError: not one-dimensional, empty, or not finite; the message shows what was found.
    """
    try:
        # A tensor is cloned, since as_tensor may share its memory.
        vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a sequence of numbers; found {values!r}") from None
    if vector.dim() != 1 or not len(vector):
        raise ValueError(f"{name} must be [T] with T >= 1 numbers; found shape {list(vector.shape)}")
    if not vector.isfinite().all():
        raise ValueError(f"{name} must be finite; found {vector.tolist()}")
    return vector


def check_length(name: str, vector: Tensor, tasks: int) -> None:
    """ValueError unless there is one number for each of the tasks that are there."""
    if len(vector) != tasks:
        raise ValueError(f"{name} has {len(vector)} numbers, one a task; found {tasks} task gradients")


class Preference:
    """A preference vector, or None, for the devices that ask for it."""

    def __init__(self, vector: Tensor | None) -> None:
        self._vector = vector

    def on(self, device: torch.device, tasks: int) -> Tensor | None:
        """On that device, to which it is moved once. Raises: see ``check_length``."""
        if self._vector is not None:
            check_length("pref_vector", self._vector, tasks)
            if self._vector.device != device:
                self._vector = self._vector.to(device)
        return self._vector


def preferences(pref_vector: Tensor | None, tasks: int) -> Tensor:
    """The preference of each task: 1/T where None were given."""
    if pref_vector is None:
        return torch.full((tasks,), 1 / tasks, dtype=torch.float64, device="cpu")
    check_length("pref_vector", pref_vector, tasks)
    return pref_vector


def shown(vector: Tensor | None) -> str:
    """For a ``repr``."""
    return "None" if vector is None else str(vector.tolist())
