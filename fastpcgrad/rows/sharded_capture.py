"""From ``.grad`` into rows of which each process keeps a part, at the end of a task or within its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .._graph import run_grad
from ..distributed.exchange import Exchange
from .capture import Aside, Capture
from .departures import Departures
from .forms import Form
from .hooks import register
from .sharded import ShardedGradients
from .task_gradients import Row


class ShardedCapture(Capture):
    """Rows of which a process gets shards, from what its own backward passes have left in ``.grad``.

    What DistributedDataParallel has averaged by then stays as it is: a mean of equal numbers. Rows that are reduced as
    their tasks are left begin to be so within the backward pass: hooks see each gradient, and leave it where it is.

    Args:
        parameters, rows, forms: see ``Capture``.
        exchange: with those who have the other parts.
        overlaps: whether they do begin so.
        of_callers_too: also within backward passes that the caller runs.
    """

    rows: ShardedGradients

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rows: ShardedGradients,
        exchange: Exchange,
        forms: Mapping[int, Form] = MappingProxyType({}),
        *,
        overlaps: bool = False,
        of_callers_too: bool = False,
    ) -> None:
        super().__init__(parameters, rows, forms)
        self._exchange, self._overlaps, self._of_callers_too = exchange, overlaps, of_callers_too
        self._prepares = overlaps  # which all processes do together
        self._touched: dict[int, set[int]] = {}  # by the task, the parameters of which it has had gradients
        self._departures: Departures | None = None
        self._handles: list[Any] = []

    def open(self, task: int) -> None:
        """See ``Capture``."""
        super().open(task)
        self._departures = None
        if self._prepares and self.rows.prepare() and self._overlaps:
            count = len(self.parameters)
            expected = self._touched.get(task, range(count))
            self._departures = Departures(expected, count, self.rows.reduce_ahead, self._into_row)

    def watch(self, averages: Callable[[], bool]) -> None:
        """See ``Capture``."""
        if self._departures is None or not self._of_callers_too:
            return
        this = weakref.ref(self)

        def look(index: int, parameter: Tensor) -> None:
            if parameter.grad is not None and not averages():
                _see(this, index, parameter.grad)

        for index, p in enumerate(self.parameters):
            self._handles.append(p.register_post_accumulate_grad_hook(partial(look, index)))

    def run(self, loss: Tensor, retain_graph: bool) -> None:
        """See ``Capture``. Nothing accumulates, so that no module takes it for its one backward pass a forward."""
        try:
            if self._departures is not None:
                for index, p in enumerate(self.parameters):
                    self._handles.append(register(p.register_hook, partial(_see, weakref.ref(self), index)))
            grads = run_grad(loss, self.parameters, retain_graph)
        finally:
            self._look_away()
        if all(grad is None for grad in grads):  # a hook of the loss may run another pass, as cached losses do
            super().run(loss, retain_graph)
            return
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad

    def see(self, index: int, grad: Tensor | None) -> None:
        """A parameter's gradient is there, or known to be none."""
        if self._departures is not None:
            with torch.no_grad():
                self._departures.see(index, grad)

    def close(self) -> None:
        """See ``Capture``. Where rows are reduced now all meet first: who has failed would leave the others waiting."""
        if self._exchange.in_step:
            goes_on = self._is_as_it_left()
            self._exchange.rounds.arrive("end of task", self.task, self.rows.digest, goes_on=goes_on)
        super().close()

    def _is_as_it_left(self) -> bool:
        """Whether the open task's gradients are those of which some have left."""
        departures, self._departures = self._departures, None
        if departures is None:
            return True
        row = [p.grad for p in self.parameters]
        touched = {index for index, grad in enumerate(row) if grad is not None}
        self._touched[self.task] = touched | self._touched.get(self.task, set())
        changed = departures.changed(row)
        if departures.late(changed):  # as it will be in the next task: better to wait for its end
            self._overlaps = False
        return not changed

    def leave(self, aside: Aside) -> None:
        """See ``Capture``."""
        self._departures = None
        self._look_away()
        super().leave(aside)

    def _look_away(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def give(self, merged: Row) -> None:
        """See ``Capture``: of all processes' parts."""
        super().give(self.rows.whole(merged))


def _see(capture: weakref.ref[ShardedCapture], index: int, grad: Tensor | None) -> None:
    """What hooks do. Where a stay was cut off and nobody ended it, they do nothing once it is forgotten."""
    if (alive := capture()) is not None:
        alive.see(index, grad)
