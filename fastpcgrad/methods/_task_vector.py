"""One number a task, as the constructors of methods take it: preferences, weights, leaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._modes import is_captured, is_faking
from .._ops import to_device

TaskVector = Tensor | Sequence[float]


def task_vector(name: str, values: TaskVector) -> Tensor:
    """``values`` as a float64 tensor ``[T]`` on the CPU, a copy.

    Raises:
        TypeError: no tensor and no sequence of numbers.
        ValueError: not one-dimensional, empty, or not finite; the message shows what was found.
        RuntimeError: under FakeTensorMode, which gives a tensor without numbers.
    """
    if is_faking():
        raise RuntimeError(f"a method with {name} must be made before FakeTensorMode is entered: it keeps their values")
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
    """A preference vector on the devices that ask for it: copied to each of them once."""

    def __init__(self) -> None:
        self._copies: dict[torch.device, tuple[Tensor, int, Tensor]] = {}

    def on(self, device: torch.device, vector: Tensor | None, tasks: int) -> Tensor | None:
        """``vector`` there; None for None. Raises: see ``check_length``."""
        if vector is None:
            return None
        check_length("pref_vector", vector, tasks)
        if vector.device == device:
            return vector
        source, version, copy = self._copies.get(device, (None, 0, vector))
        if source is not vector or version != vector._version:
            copy = to_device(vector, device, constant=True)
            if not is_captured(device):  # the memory of a graph has the vector only while that is replayed
                self._copies[device] = (vector, vector._version, copy)
        return copy


def preferences(pref_vector: Tensor | None, tasks: int) -> Tensor:
    """The preference of each task: 1/T where None were given."""
    if pref_vector is None:
        return torch.full((tasks,), 1 / tasks, dtype=torch.float64, device="cpu")
    check_length("pref_vector", pref_vector, tasks)
    return pref_vector


def shown(vector: Tensor | None) -> str:
    """For a ``repr``."""
    return "None" if vector is None else str(vector.tolist())
