"""How gradients get from ``.grad`` into the rows of their task, and the merged gradient back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from operator import attrgetter
from typing import Any

from torch import Tensor

from .moved_gradients import MovedGradients
from .task_gradients import Row, TaskGradients

_GRAD = attrgetter("grad")


class Capture:
    """Rows that are what autograd left: a task's backward passes begin with no ``.grad``, and its row is what is there
    when the task is left.

    Args:
        parameters: leaves, each once.
        rows: made for them.
    """

    def __init__(self, parameters: Sequence[Tensor], rows: TaskGradients) -> None:
        self.parameters, self.rows = parameters, rows
        self.task = -1
        self._merged: Row = []

    def set_aside(self) -> list[tuple[Tensor, Tensor]]:
        """Clear every ``.grad``; gives what was there, but not the last merged gradient: its memory is for the rows."""
        aside = []
        for p, merged in zip_longest(self.parameters, self._last_merged()):
            grad = p.grad
            if grad is not None:
                if grad is not merged:
                    aside.append((p, grad))
                p.grad = None
        self._merged = []
        return aside

    def open(self, task: int) -> None:
        """From here on gradients are those of ``task``."""
        self.task = task
        row = self.rows.take(task)
        if row is not None:  # autograd adds to what is there
            for p, grad in zip(self.parameters, row, strict=True):
                p.grad = grad

    def close(self) -> None:
        """What there is of the open task's gradients is its row."""
        row = list(map(_GRAD, self.parameters))
        self._clear()
        self.rows.put(self.task, row)

    def drop(self) -> bool:
        """Forget what there is of the open task's gradients; whether there was any."""
        found = any(p.grad is not None for p in self.parameters)
        self._clear()
        return found

    def give(self, merged: Row) -> None:
        """The merged gradient, made of the rows' memory, into ``.grad``."""
        for p, own in zip(self.parameters, merged, strict=True):
            p.grad = own
        self._merged = merged

    def _last_merged(self) -> Iterable[Tensor | None]:
        return self._merged

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None


class MovedCapture(Capture):
    """Rows that are copies: hooks move each gradient as soon as autograd has it, so that not all are there at once.

    The hooks hold this object weakly: they must not keep its rows alive as long as the model lives.
    """

    rows: MovedGradients

    def __init__(self, parameters: Sequence[Tensor], rows: MovedGradients) -> None:
        super().__init__(parameters, rows)
        self._given: list[weakref.ref[Tensor] | None] = []
        this = weakref.ref(self)
        handles = [p.register_post_accumulate_grad_hook(_mover(this, i)) for i, p in enumerate(parameters)]
        weakref.finalize(self, _remove, handles)

    def open(self, task: int) -> None:
        self.rows.open(task)
        self.task = task

    def close(self) -> None:
        self._move_all()
        self.rows.close()
        self.task = -1

    def drop(self) -> bool:
        self.task = -1
        return super().drop() | self.rows.drop()

    def give(self, merged: Row) -> None:
        """The merged gradient into ``.grad``, while the rows are freed: an error ends the round."""
        try:
            for p, own in zip(self.parameters, self.rows.give(merged), strict=True):
                p.grad = own
        except BaseException:  # most likely out of memory
            self.rows.clear()
            self._clear()
            raise
        # Not held: what these gradients take is no rows' memory, and zero_grad() must free it.
        self._given = [None if p.grad is None else weakref.ref(p.grad) for p in self.parameters]

    def move(self, index: int) -> None:
        """A parameter's gradient, if a task is open and there is one, to its place in the row."""
        p = self.parameters[index]
        if self.task >= 0 and p.grad is not None:
            self.rows.add(index, p.grad)
            p.grad = None

    def _last_merged(self) -> Iterable[Tensor | None]:
        given, self._given = self._given, []
        return (None if reference is None else reference() for reference in given)

    def _move_all(self) -> None:
        """What came without a hook: gradients that were assigned."""
        for index in range(len(self.parameters)):
            self.move(index)


def _mover(capture: weakref.ref[MovedCapture], index: int) -> Callable[[Tensor], None]:
    def move(_: Tensor) -> None:
        if (alive := capture()) is not None:
            alive.move(index)

    return move


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
