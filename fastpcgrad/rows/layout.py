"""The parameters of a surgery and the rows that their gradients become, looked up anew at each round."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._gradients import as_real, gradient_dtype
from . import host
from .capture import Capture, MovedCapture
from .moved import MovedGradients, check_accumulate_dtype
from .parameters import (
    CheckedGranularity,
    Division,
    HasGroups,
    are_among,
    check_parameters,
    problem_of_each,
)
from .task_gradients import TaskGradients

_KIND = attrgetter(*("dtype", "device", "shape"), *(("grad_dtype",) if hasattr(Tensor, "grad_dtype") else ()))


class Layout(NamedTuple):
    """What a round knows of its parameters.

    Attributes:
        found: the trainable ones, as the source has them.
        kinds: dtype, device, shape and dtype of the gradient of each; None for one that is lazy.
        division: which of the different ones form one problem.
        capture: their rows.
        lazy: whether some have no shape yet, and no row.
    """

    found: list[Tensor]
    kinds: Sequence[tuple[Any, ...] | None]
    division: Division
    capture: Capture
    lazy: bool


class RowChoice(NamedTuple):
    """How a caller wants the rows, see ``GradientSurgery``; None: as the gradients come."""

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    accumulate_dtype: torch.dtype | None = None


class Layouts:
    """The layout of the parameters that a source has at the time.

    Args:
        source: is asked for its parameter groups anew each round.
        shared: the parameters that undergo surgery; None: as the method's scope says.
        granularity: which of them form one problem.
        rows: how they are kept.
    Raises:
        TypeError, ValueError: see ``GradientSurgery``.
    """

    def __init__(
        self, source: HasGroups, shared: Sequence[Tensor] | None, granularity: CheckedGranularity, rows: RowChoice
    ) -> None:
        self._source, self._shared, self._granularity, self._rows = source, shared, granularity, rows
        self.current = self._laid_out(self.trainable())

    def trainable(self) -> list[Tensor]:
        """The parameters that require grad, as the source has them now."""
        return [p for group in self._source.param_groups for p in group["params"] if p.requires_grad]

    def resolve(self) -> Layout:
        """Look the trainable parameters up; lay the rows out anew where they changed.

        Raises:
            RuntimeError: they changed while rows are filled.
        """
        layout, found = self.current, self.trainable()
        filled = layout.capture.rows.tasks
        same = len(found) == len(layout.found) and all(map(is_, found, layout.found))
        if same and (filled or _kinds(found) == layout.kinds):
            return layout
        if filled:
            raise RuntimeError(
                f"the trainable parameters changed within a round ({len(layout.found)} before, {len(found)} now) "
                f"while rows of tasks {filled} are filled: call merge() or discard() first"
            )
        self.current = self._laid_out(found)
        return self.current

    def _laid_out(self, found: list[Tensor]) -> Layout:
        parameters = list({id(p): p for p in found if not is_lazy(p)}.values())
        check_parameters(parameters, self._shared, self._rows.dtype)
        division = Division(
            shared=None if self._shared is None else are_among(parameters, self._shared),
            groups=problem_of_each(parameters, self._granularity, self._source.param_groups, self._shared),
        )
        lazy = any(map(is_lazy, found))
        return Layout(found, _kinds(found), division, self._capture_for(parameters), lazy)

    def _capture_for(self, parameters: Sequence[Tensor]) -> Capture:
        """Of rows as autograd leaves them, or of such that are converted or sent away."""
        real = as_rows_see(parameters)
        plain = TaskGradients(real, self._rows.dtype)
        copies = host.copies_for(plain.device, self._rows.device)
        sums = self._rows.accumulate_dtype
        if sums is not None:
            check_accumulate_dtype(sums, plain.dtype)
            if sums == plain.dtype and copies is None:  # the rows themselves will do
                sums = None
        if copies is None and sums is None and all(gradient_dtype(p) == plain.dtype for p in real):
            return Capture(parameters, plain)
        return MovedCapture(parameters, MovedGradients(real, plain.dtype, sums, copies))

    def snapshot(self) -> dict[str, Any]:
        """What a copy of this object needs to go on with the round, see ``restored``."""
        state = {name: value for name, value in self.__dict__.items() if name != "current"}
        return {**state, "rows_of_round": self.current.capture.rows.snapshot()}

    @classmethod
    def restored(cls, snapshot: dict[str, Any]) -> Layouts:
        """A copy, of a copy's parameters. The layout is made anew, for its process' memory; the rows of the round go
        along."""
        rows = snapshot.pop("rows_of_round")
        layouts = cls.__new__(cls)
        layouts.__dict__.update(snapshot)
        layouts.current = layouts._laid_out(layouts.trainable())
        layouts.current.capture.rows.restore(rows)
        return layouts


def as_rows_see(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """With the shapes, strides and dtypes that their rows have: complex ones as pairs of real numbers."""
    return [as_real(p.detach()) if p.is_complex() else p for p in parameters]


def _kinds(found: Sequence[Tensor]) -> Sequence[tuple[Any, ...] | None]:
    try:
        return list(map(_KIND, found))
    except RuntimeError:  # a lazy one has no shape, and one that is no leaf no grad_dtype
        return [None if is_lazy(p) else (p.dtype, p.device, p.shape, gradient_dtype(p)) for p in found]
