"""Errors about values: raised at once where looking is free, by a later call where it would wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._modes import is_captured, is_fake

Describe = Callable[[int, list[float]], str]
"""The task and its values, in words for the user."""


def known(flag: Tensor) -> bool | None:
    """What a flag says; None on a GPU, where looking would wait, and of a fake tensor, where there is nothing."""
    return None if flag.is_cuda or is_fake(flag) else bool(flag)


class Refusals:
    """The values that one balancer was given and cannot take."""

    def __init__(self) -> None:
        self._on_their_way: deque[tuple[torch.cuda.Event, Tensor, Describe]] = deque()

    def __reduce__(self) -> tuple[type[Refusals], tuple[()]]:
        # A copy was given nothing; and events cannot be copied.
        return Refusals, ()

    def refuse(self, bad: Tensor, values: Sequence[Tensor], describe: Describe) -> None:
        """ValueError where a task's values are bad; on a GPU it is left to ``raise_due`` and the caller goes on.

        Args:
            bad: ``[T]`` bool.
            values: what ``describe`` is to be given of each task, each ``[T]``.
        """
        is_bad = known(bad.any())
        if is_bad is False or is_fake(bad):
            return
        found = torch.stack([bad.to(values[0].dtype), *values])
        if is_bad:
            raise ValueError(_message(found, describe))
        if sent := _sent(found):
            self._on_their_way.append((*sent, describe))

    def raise_due(self, wait: bool = False) -> None:
        """ValueError where bad values of an earlier call have arrived; ``wait`` for those that have not."""
        while self._on_their_way:
            event, found, describe = self._on_their_way[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._on_their_way.popleft()
            if found[0].any():
                raise ValueError(f"{_message(found, describe)} (in an earlier call, whose update was left out)")


def _sent(found: Tensor) -> tuple[torch.cuda.Event, Tensor] | None:
    """What happens when a copy is there, and the copy, on its way to pinned memory.

    None while a graph is captured: its replay runs no Python that could look.
    """
    if is_captured(found.device):
        return None
    copy = found.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(found.device))
    return event, copy


def _message(found: Tensor, describe: Describe) -> str:
    bad, *values = found.tolist()
    task = next(t for t, is_bad in enumerate(bad) if is_bad)
    return describe(task, [value[task] for value in values])
