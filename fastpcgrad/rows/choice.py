"""Whether task gradients are kept as they are or as factors: what is asked for, and what pays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor

Choice = Literal["auto", "dense", "factored"]

_VARIABLE = "FASTPCGRAD_ROWS"
_CHOICES = ("auto", "dense", "factored")
_switched_off = ContextVar("switched_off", default=False)

LEAST_ELEMENTS = 1_000_000
"""Of weights as factors: below, looking at the graph costs more than it saves."""


class RowsReport(NamedTuple):
    """How the task gradients of a surgery were kept.

    Attributes:
        factored: the number of weights and tables kept as factors, and of their elements.
        stacked: whether the tasks went through the trunk in one backward pass.
        dense: why the others were kept as they are, by how many parameters it holds for.
        loop: why there was a backward pass a task; None where the tasks were stacked.
    """

    factored: int = 0
    elements: int = 0
    stacked: bool = False
    dense: dict[str, int] = {}  # noqa: RUF012  (never written to)
    loop: str | None = None


SMALL = RowsReport(dense={f"the model's matrices have less than {LEAST_ELEMENTS} elements": 1})
BY_CALLER = RowsReport(dense={"backward passes that the surgery did not run": 1})


def check_rows(value: Any) -> Choice:
    """``value``; ValueError where it is no choice."""
    if value not in _CHOICES:
        raise ValueError(f"rows must be {', '.join(map(repr, _CHOICES[:-1]))} or {_CHOICES[-1]!r}; found {value!r}")
    return cast("Choice", value)


@contextmanager
def dense_rows() -> Iterator[None]:
    """A context in which every surgery keeps its task gradients as they are, whatever ``rows`` says.

    In this thread or task alone. The environment variable ``FASTPCGRAD_ROWS=dense`` does the same for a process.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with fastpcgrad.dense_rows():
        ...     fastpcgrad.backward([x[0] - x[1], x[1]])
        >>> x.grad
        tensor([1.5000, 0.5000])
    """
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def in_force(rows: Choice) -> Choice:
    """What holds of ``rows`` here and now.

    Raises:
        ValueError: ``FASTPCGRAD_ROWS`` is neither auto nor dense.
    """
    named = os.environ.get(_VARIABLE) or "auto"
    if named not in ("auto", "dense"):
        raise ValueError(f"{_VARIABLE} must be auto or dense; found {named!r}")
    return "dense" if named == "dense" or _switched_off.get() else rows


def is_large(parameters: Iterable[Tensor]) -> bool:
    """Whether factors may pay at all, before anything is known of the graph."""
    return sum(p.numel() for p in parameters if p.dim() == 2) >= LEAST_ELEMENTS


def factors_pay(rows: int, inner: int, outer: int, tasks: int) -> bool:
    """Whether δ and a take less time than the task gradients δ_tᵀ a of a weight.

    Products with a aᵀ take M (in + k·out) multiplications for each of M rows; the k gradients k·in·out. The latter are
    also written and read again; but the former are in float64, and by the measured times a quarter is where it pays.

    Args:
        rows: M, of a and of each δ.
        inner, outer: of the weight.
        tasks: k, those that reach it.
    """
    return tasks > 1 and 4 * rows * (inner + tasks * outer) <= tasks * inner * outer


def lookups_pay(lookups: int, places: int, tasks: int) -> bool:
    """Whether the δ of lookups take less time than the task gradients of a table, which are as large as it is.

    They are sorted, noted and added up where autograd adds them up and writes the rest; by the measured times the two
    are equal where a table has two to four rows for each lookup.

    Args:
        lookups: of all uses.
        places: the rows of the table.
        tasks: those that reach it.
    """
    return tasks > 1 and 4 * lookups <= places


def stacking_pays(rows: int, within: int, beside: int) -> bool:
    """Whether the tasks are to go through a trunk together.

    Args:
        rows: the most that a and δ of one of its weights have.
        within: elements of its weights that are factors.
        beside: elements of its other parameters, of which there is a gradient for each task.
    """
    return rows <= 64 and 4 * beside <= within
