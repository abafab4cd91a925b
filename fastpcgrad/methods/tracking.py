"""What a method is that keeps something as large as J: for each task a state of each column."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._shares import Shares
from .base import Method, Solution, known_parameters

Row = list[Tensor | None]
"""Of each parameter a task's gradient, or what is kept of it; None: zeros."""


class Tracked(NamedTuple):
    """The rows that a step merges.

    Attributes:
        tasks: the index of the task of each, ascending; absent ones too, where what is kept of them counts.
        rows: J; all rows of a block have one dtype. Read before the next step, and never written.
        besides: rows that are no task's, of the same dtypes. They come last in the Gram matrix that ``solve_for`` is
            given, and have weights as the others have; the report leaves them out.
    """

    tasks: Sequence[int]
    rows: Sequence[Row]
    besides: Sequence[Row] = ()


class Tracking(Method):
    """A rule that first lets each task gradient change what it keeps of that task, column by column, such as an average
    over steps; the rows that come of it are then merged as by a Gram-based method.

    A subclass gives ``track``, and ``solve_for``, which is given the Gram matrix of the rows that ``track`` gave; with
    ``finish`` it may change the merged gradient column by column.

    It needs the task gradients themselves, of the same parameters in the same order in every step, from
    ``GradientSurgery``, ``PCGrad``, or ``backward`` and ``grad`` with ``inputs``: dense, all parameters as one problem,
    in one process. All else is refused. A task that is absent leaves what is kept of it as it is; a parameter that a
    task does not touch counts as a gradient of zeros.

    State: what is kept lies where the rows lie, in their dtype, or fp32 for 16-bit rows: T·N elements that no other
    method needs. Of a task nothing is kept for parameters that it has never touched.

    Numerics: a step in which a task gradient is not finite gives NaN and changes no state. That is looked at, which
    waits for a GPU. A loss scale that changes would be part of what is kept: use it with gradients that have none.
    """

    needs_rows = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all that is kept."""
        self._step = 0
        self._widths: list[int] | None = None
        self._parameters = ()
        self._kept: dict[int, Row] = {}

    @property
    def known_tasks(self) -> int:
        return 1 + max(self._kept, default=-1)

    @abstractmethod
    def track(self, tasks: Sequence[int], rows: Sequence[Row], gram: Tensor, losses: Sequence[float]) -> Tracked | None:
        """What to merge in this step.

        Args:
            tasks: the index of each task that is there, ascending.
            rows: their gradients; not changed.
            gram: the Gram matrix of these, finite.
            losses: of each its loss; empty unless the method has ``needs_losses``.
        Returns:
            None where something is out of range: the merged gradient is NaN, and nothing may have changed.
        """

    def finish(self, merged: Row) -> None:
        """Change the merged gradient in place."""

    def solve(self, gram: Tensor) -> Solution:
        raise TypeError(
            f"{type(self).__name__} needs the task gradients themselves, of which it keeps something: use it in "
            "GradientSurgery, PCGrad, backward or grad"
        )

    def check_parameters(self, parameters: Sequence[Tensor], rows: Sequence[Row], widths: Sequence[int]) -> None:
        """ValueError where what is kept is of other parameters.

        Args:
            parameters: whose gradients the rows are, in their order.
            rows: the gradients of each task.
            widths: the elements of each parameter.
        """
        if all(own is None for row in self._kept.values() for own in row):  # of no parameter yet
            self._widths, self._kept, self._parameters = None, {}, ()
        kept = [row for row in self._kept.values() if len(row) == len(widths)]
        fits = self._widths in (None, list(widths)) and all(
            own is None or grad is None or own.shape == grad.shape
            for before in kept
            for row in rows
            for own, grad in zip(before, row, strict=True)
        )
        if not fits or self.knows_others(parameters):
            raise ValueError(
                f"{type(self).__name__} keeps something of each of {len(self._widths or ())} parameters with "
                f"{sum(self._widths or ())} elements; found {len(widths)} with {sum(widths)}, others, or in another "
                "order: give it the same in every step, and a method object to each optimizer, or call reset()"
            )
        self._widths = list(widths)
        self._parameters = known_parameters(parameters)

    def kept(self, task: int, row: Row) -> Row:
        """What is kept of a task, zeros at first, of each parameter that it has touched by now."""
        kept = self._kept.setdefault(task, [None] * len(row))
        for index, grad in enumerate(row):
            if grad is not None:
                kept[index] = like(kept[index], grad)
        return kept

    def averaged(self, tasks: Sequence[int], rows: Sequence[Row], decay: float, gains: Sequence[float]) -> list[Row]:
        """y_t ← decay·y_t + gain_t·g_t for what is kept of each task, y_t."""
        result = []
        for task, row, gain in zip(tasks, rows, gains, strict=True):
            kept = self.kept(task, row)
            if there := [own for own in kept if own is not None]:
                torch._foreach_mul_(there, decay)
            pairs = [(own, grad) for own, grad in zip(kept, row, strict=True) if own is not None and grad is not None]
            for own, grad in pairs:
                own.add_(grad, alpha=gain)
            result.append(kept)
        return result

    state_keys: tuple[str, ...] = ("step", "widths", "rows")
    """What ``state_dict`` has."""

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError where a state has other keys than ``state_keys``, or steps and widths that cannot be."""
        if set(state) != set(self.state_keys):
            raise ValueError(
                f"the state of {type(self).__name__} has keys {sorted(self.state_keys)}; found {sorted(state)}"
            )
        check_count("step", state["step"], 0)
        widths = state["widths"]
        if widths is not None and not (isinstance(widths, list | tuple) and all(isinstance(n, int) for n in widths)):
            raise ValueError(f"widths must be the number of elements of each parameter, or None; found {widths!r}")

    def state_dict(self) -> dict[str, Any]:
        """``step``, the steps so far; ``widths``, the elements of each parameter; ``rows``: what is kept of each task
        by its index, a list with a tensor or None for each parameter. Copies: T·N elements."""
        rows = {task: copied(row) for task, row in self._kept.items()}
        return {"step": self._step, "widths": self._widths, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, or what cannot be the state of such a method.
        """
        self.check_state(state)
        widths = state["widths"]
        kept = {task: loaded_row(f"rows[{task}]", row, widths) for task, row in by_task("rows", state["rows"])}
        self._step, self._kept, self._parameters = state["step"], kept, ()
        self._widths = None if widths is None else list(widths)


def by_task(name: str, state: Any) -> list[tuple[int, Any]]:
    """What a state has for tasks by their index; ValueError where it has it otherwise."""
    if not isinstance(state, Mapping) or not all(isinstance(task, int) and task >= 0 for task in state):
        found = list(state) if isinstance(state, Mapping) else state
        raise ValueError(f"{name} must be a dict by the index of the task; found {found!r}")
    return list(state.items())


def check_count(name: str, value: Any, least: int) -> None:
    """ValueError for what is in a state in the place of a count."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; found {value!r}")


def loaded_shares(name: str, state: object) -> Shares:
    """Shares of one problem, from what their ``state`` gave; ValueError for anything else."""
    shares = Shares()
    shares.load(name, state)
    if shares.values is not None and shares.values.dim() > 1:
        raise ValueError(f"{name} must be of one problem, [T]; found {list(shares.values.shape)}")
    return shares


def loaded_row(name: str, row: Any, widths: Sequence[int] | None) -> Row:
    """A copy of what a state has of each parameter; ValueError where that cannot be of parameters with these widths."""
    is_row = isinstance(row, list | tuple) and all(own is None or isinstance(own, Tensor) for own in row)
    found = [None if own is None else own.numel() for own in row] if is_row else row
    if not is_row or len(row) != len(widths or ()) or not all(map(_may_be, found, widths or ())):
        raise ValueError(
            f"{name} must hold a tensor or None for each parameter, with {widths} elements; found {found!r}"
        )
    return copied(row)


def copied(row: Row) -> Row:
    """The row in memory of its own."""
    return [None if own is None else own.detach().clone() for own in row]


def _may_be(found: int | None, width: int) -> bool:
    return found is None or found == width


def like(kept: Tensor | None, grad: Tensor) -> Tensor:
    """What is kept, zeros for None, as the gradient is: on its device, in the order of its memory, in fp32 at least."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if kept is None:
        return torch.zeros_like(grad, dtype=dtype)
    if (kept.dtype, kept.device, kept.stride()) == (dtype, grad.device, grad.stride()):
        return kept
    return torch.empty_like(grad, dtype=dtype).copy_(kept)


def squares_fit(rows: Sequence[Row], gram: Tensor) -> bool:
    """Whether the squares of gradients, and sums of those of a million steps, are numbers of the dtype of what is kept.

    Args:
        gram: the Gram matrix of the rows.
    """
    dtypes = {torch.promote_types(grad.dtype, torch.float32) for row in rows for grad in row if grad is not None}
    largest = min((torch.finfo(dtype).max for dtype in dtypes), default=1.0)
    return float(gram.diagonal().max()) <= largest / 2**20
