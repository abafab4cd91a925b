"""How gradients get from ``.grad`` into the rows of their task, and the merged gradient back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from operator import attrgetter
from types import MappingProxyType

from torch import Tensor

from .._graph import run_backward
from .forms import Form
from .moved import MovedGradients
from .task_gradients import Row, TaskGradients

_GRAD = attrgetter("grad")

Aside = list[tuple[Tensor, Tensor]]
"""Parameters and the gradients that they had before a stay."""


class Capture:
    """Rows that are what autograd left: a task's backward passes begin with no ``.grad``, and its row is what is there
    when the task is left.

    Whatever instruction an exception interrupts, ``leave`` puts right.

    Args:
        parameters: leaves, each once.
        rows: made for them.
        forms: by its index, of each parameter whose gradient a row does not hold as it is.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rows: TaskGradients, forms: Mapping[int, Form] = MappingProxyType({})
    ) -> None:
        self.parameters, self.rows, self.forms = parameters, rows, forms
        self.task = -1
        """The open task; -1: none."""
        self._merged: Row = []

    def aside(self) -> Aside:
        """What is in ``.grad``, but not the last merged gradient: its memory is for the rows. Changes nothing."""
        return [
            (p, grad)
            for p, merged in zip_longest(self.parameters, self.last_merged())
            if (grad := p.grad) is not None and grad is not merged
        ]

    def enter(self) -> None:
        """Begin a stay: clear every ``.grad``."""
        self._clear()
        self._merged = []

    def open(self, task: int) -> None:
        """From here on gradients are those of ``task``."""
        self.task = task
        row = self.rows.take(task)
        if row is not None:  # autograd adds to what is there
            for p, grad in zip(self.parameters, self._as_they_are(row) if self.forms else row, strict=True):
                p.grad = grad

    def watch(self, averages: Callable[[], bool]) -> None:
        """From here on, while the task is open, backward passes are the caller's own.

        Args:
            averages: whether a module averages what they leave.
        """

    def run(self, loss: Tensor, retain_graph: bool) -> None:
        """A loss of the open task backward, once in a stay."""
        run_backward(loss, retain_graph)

    def close(self) -> None:
        """What there is of the open task's gradients is its row."""
        self.check_forms()
        self.keep(self.task, self.taken())
        self.task = -1

    def keep(self, task: int, row: Row) -> None:
        """Gradients as autograd left them, of which the caller keeps no other reference, are a task's row."""
        for index in self.forms:
            row[index] = self._into_row(index, row[index])
        self.rows.keep(task, row)

    def check_forms(self) -> None:
        """RuntimeError where what backward passes have made is not all in ``.grad``."""
        for form in self.forms.values():
            form.check()

    def taken(self) -> Row:
        """What there is of the open task's gradients, as autograd left it; it is gone from ``.grad``."""
        row = list(map(_GRAD, self.parameters))
        self._clear()
        return row

    def drop(self) -> bool:
        """Forget what there is of the open task's gradients; whether there was any."""
        found = any(p.grad is not None for p in self.parameters)
        self._clear()
        self.task = -1
        return found

    def leave(self, aside: Aside) -> None:
        """End a stay, whether or not it began or a task is open; what was set aside is in ``.grad`` again."""
        if self.task >= 0:
            self.drop()
        for p, grad in aside:
            p.grad = grad

    def give(self, merged: Row) -> None:
        """The merged gradient, made of the rows' memory, into ``.grad``."""
        self._merged = self._as_they_are(merged) if self.forms else merged
        for p, own in zip(self.parameters, self._merged, strict=True):
            p.grad = own

    def last_merged(self) -> Iterable[Tensor | None]:
        """The last merged gradient of each parameter, as long as it may be in ``.grad``."""
        return self._merged

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _as_they_are(self, row: Row) -> Row:
        """The row with the gradients that parameters have, in the same memory."""
        return [self._as_it_is(index, grad) for index, grad in enumerate(row)]

    def _as_it_is(self, index: int, own: Tensor | None) -> Tensor | None:
        return self.forms[index].out_of_row(own) if own is not None and index in self.forms else own

    def _into_row(self, index: int, grad: Tensor | None) -> Tensor | None:
        return self.forms[index].into_row(grad) if grad is not None and index in self.forms else grad


class MovedCapture(Capture):
    """Rows that are copies: hooks move each gradient as soon as autograd has it, so that not all are there at once.

    The hooks exist within a stay alone, and those of others come first. They hold this object weakly: where a stay was
    cut off and nobody ended it, they are nothing once it is forgotten.
    """

    rows: MovedGradients

    def __init__(
        self, parameters: Sequence[Tensor], rows: MovedGradients, forms: Mapping[int, Form] = MappingProxyType({})
    ) -> None:
        super().__init__(parameters, rows, forms)
        self._given: list[weakref.ref[Tensor] | None] = []

    def enter(self) -> None:
        super().enter()
        self._given = []
        this = weakref.ref(self)
        for index, p in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(_Mover(this, index))

    def open(self, task: int) -> None:
        self.task = task
        self.rows.open(task)

    def close(self) -> None:
        self.check_forms()
        # What came without a hook: gradients that were assigned, or that another's later hook has looked at first.
        for index in range(len(self.parameters)):
            self.move(index)
        self.rows.close()
        self.task = -1

    def drop(self) -> bool:
        return super().drop() | self.rows.drop()

    def leave(self, aside: Aside) -> None:
        for p in self.parameters:
            hooks = p._post_accumulate_grad_hooks
            for key in [key for key, hook in (hooks or {}).items() if isinstance(hook, _Mover) and hook.is_of(self)]:
                del hooks[key]
        super().leave(aside)

    def give(self, merged: Row) -> None:
        """The merged gradient into ``.grad``, while the rows are freed: an error ends the round."""
        try:
            for index, (p, own) in enumerate(zip(self.parameters, self.rows.give(merged), strict=True)):
                p.grad = self._as_it_is(index, own)
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
            own = self._into_row(index, p.grad)
            assert own is not None
            self.rows.add(index, own)
            p.grad = None

    def last_merged(self) -> Iterable[Tensor | None]:
        return (None if reference is None else reference() for reference in self._given)


class _Mover:
    """A hook of ``MovedCapture`` on one parameter."""

    def __init__(self, capture: weakref.ref[MovedCapture], index: int) -> None:
        self._capture, self._index = capture, index

    def is_of(self, capture: MovedCapture) -> bool:
        """Whether it is of that object, or of one that is gone."""
        return self._capture() in (None, capture)

    def __call__(self, parameter: Tensor) -> None:
        # A hook that was registered within the stay has still to see the gradient: that is moved when the task is left.
        last = next(reversed(parameter._post_accumulate_grad_hooks.values()))
        if last is self and (alive := self._capture()) is not None:
            alive.move(self._index)
