"""Gradients that leave for their shards while the backward pass that makes them still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .task_gradients import Row

Overlap = bool | Literal["auto"]
"""Whether gradients may leave before their task is closed, see ``GradientSurgery``."""

Send = Callable[[Row, Callable[[list[int]], bool]], list[list[int]]]
"""See ``ShardedGradients.reduce_ahead``."""


def check_overlap(value: object) -> Overlap:
    """ValueError for anything but True, False and ``auto``."""
    if value is True or value is False:
        return value
    if value == "auto":
        return "auto"
    raise ValueError(f"overlap must be True, False or 'auto'; found {value!r}")


def may_overlap(choice: Overlap, devices: Iterable[torch.device]) -> bool:
    """Whether gradients on these devices may leave ahead at all: one device, whose backward pass is one thread."""
    found = set(devices)
    return len(found) == 1 and {"cpu": choice is not False, "cuda": choice is True}.get(found.pop().type, False)


class Departures:
    """Which gradients of an open task have left, as what.

    That they stay as they are is not known when they leave. It is looked at when the task is closed: where a further
    backward pass has added to one, a hook has changed one, or one came that was not waited for, all of the task's are
    sent once more, as they are then. So what has left too early costs time and is never wrong.

    Args:
        expected: the parameters whose gradients are waited for.
        count: how many parameters there are.
        send: begins to reduce what is there.
        into_row: the gradient of a parameter, by its index, as a row has it.
    """

    def __init__(
        self, expected: Iterable[int], count: int, send: Send, into_row: Callable[[int, Tensor], Tensor | None]
    ) -> None:
        self._missing, self._send, self._into_row = set(expected), send, into_row
        self._found: Row = [None] * count
        self._row: Row = [None] * count
        self._left: dict[int, tuple[Tensor | None, int]] = {}
        self._streams: dict[torch.device, Any] = {}

    def see(self, index: int, grad: Tensor | None) -> None:
        """A parameter's gradient is there, or known to be none; what can leave now does."""
        if grad is not None:
            if index in self._left or grad.requires_grad or not self._is_in_order(grad.device):
                return
            self._found[index], self._row[index] = grad, self._into_row(index, grad)
        self._missing.discard(index)
        for within in self._send(self._row, self._missing.isdisjoint):
            for other in within:
                self._left.setdefault(other, (self._found[other], _version(self._found[other])))

    def changed(self, row: Sequence[Tensor | None]) -> list[int]:
        """The parameters whose gradient has left as another than it is in the end."""
        return [
            index
            for index, (grad, version) in self._left.items()
            if row[index] is not grad or _version(grad) != version
        ]

    def late(self, changed: Iterable[int]) -> bool:
        """Whether some of these had left as a gradient, and not for there being none."""
        return any(self._left[index][0] is not None for index in changed)

    def _is_in_order(self, device: torch.device) -> bool:
        """Whether what is done now comes after all gradients that were seen: on a GPU, in the same stream."""
        if device.type != "cuda":
            return True
        stream = torch.cuda.current_stream(device)
        return bool(self._streams.setdefault(device, stream) == stream)


def _version(grad: Tensor | None) -> int:
    """What torch counts the writes to it with."""
    return 0 if grad is None else grad._version
