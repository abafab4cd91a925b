"""Rows and a method in, the merged gradient out: which parameters form one problem, and who is summed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter

import torch

from .._memory import prefer_huge_pages
from .._ops import Figures, Later
from ..methods import Elementwise, Method
from ..rows.columns import Columns, Tensors
from ..rows.task_gradients import Row, TaskGradients
from .report import ConflictReport

_VERSION = attrgetter("_version")


def merge(
    grads: TaskGradients,
    method: Method,
    shared: Sequence[bool] | None = None,
    groups: Sequence[int] | None = None,
    *,
    in_place: bool,
) -> tuple[ConflictReport, Row]:
    """Merge all rows.

    Args:
        grads: the rows, of one task or more.
        method: makes weights of a Gram matrix.
        shared: for each parameter whether it undergoes surgery; the others are summed. None: the method's scope.
        groups: for each parameter the problem (0..) that it belongs to; None: one problem, or the method's scope.
        in_place: write the merged gradient over that of the first task that has one, for each parameter; else to
            fresh memory.
    Returns:
        the report, and for each parameter its merged gradient, None where it has none.
    Raises:
        Whatever the method raises. Where rows have been written by then, and after an interrupt, ``grads`` is at risk.
    """
    columns = grads.columns()
    complete = not any(0 in row for row in columns.pointers)
    out = list(columns.tensors[0]) if complete else _first_of_each(columns.tensors)
    if not in_place:
        out = [None if place is None else prefer_huge_pages(torch.empty_like(place)) for place in out]
        return _merge(columns, tuple(grads.tasks), method, shared, groups, out, complete)
    before = _versions(out)
    grads.at_risk = True
    try:
        return _merge(columns, tuple(grads.tasks), method, shared, groups, out, complete)
    except Exception:
        grads.at_risk = _versions(out) != before
        raise


def _versions(out: Row) -> list[int]:
    """What autograd counts the writes to each tensor with."""
    try:
        return list(map(_VERSION, out))
    except (AttributeError, RuntimeError):  # a None; an inference tensor, which has no such count
        return [0 if place is None or place.is_inference() else place._version for place in out]


def _merge(
    columns: Columns,
    tasks: tuple[int, ...],
    method: Method,
    shared: Sequence[bool] | None,
    groups: Sequence[int] | None,
    out: Row,
    complete: bool,
) -> tuple[ConflictReport, Row]:
    one_problem = shared is groups is None and method.scope != "parameter"
    blocks = columns.whole
    if one_problem and blocks is not None and (complete or isinstance(method, Elementwise)):
        return ConflictReport(tasks, method.merge(blocks, out, tasks)), out
    if isinstance(method, Elementwise):
        return ConflictReport(tasks, _merge_each(columns, method, out, tasks, shared)), out

    everywhere = [True] * len(out) if complete else _everywhere(columns.tensors)
    problems = _problems(method, everywhere, shared, groups)
    by_problem = groups is not None or method.scope == "parameter"
    count = 1 + max((p for p in problems if p is not None), default=-1)

    inside = [-1 if p is None else p for p in problems]
    grams = columns.gram(inside, count if by_problem else 1)
    gram = grams if by_problem else grams[0]
    solution = method.checked_solve(gram, tasks)
    each = solution.weights.reshape(-1, len(tasks))
    # Rows of weights: of each problem, the same for parameters that some task does not have, and ones for a sum.
    table = torch.cat([each, method.partial_weights(each), each.new_ones(1, len(tasks))])
    summed = 2 * len(each)
    weights_of = [
        summed if p is None else p if whole else len(each) + p for p, whole in zip(problems, everywhere, strict=True)
    ]
    columns.combine(table, weights_of, out)

    def figures() -> Figures:
        return Figures(grams.sum(dim=0), *solution, grams) if by_problem else Figures(gram, *solution)

    drop_partial = method.scope == "parameter"
    return ConflictReport(tasks, figures), [
        place if whole or problem is None or not drop_partial else None
        for place, whole, problem in zip(out, everywhere, problems, strict=True)
    ]


def _everywhere(tensors: Tensors) -> list[bool]:
    """For each parameter whether every task has a gradient."""
    return [all(grad is not None for grad in column) for column in zip(*tensors, strict=True)]


def _first_of_each(tensors: Tensors) -> Row:
    """For each parameter the gradient of the first task that has one."""
    return [next((grad for grad in column if grad is not None), None) for column in zip(*tensors, strict=True)]


def _merge_each(
    columns: Columns, method: Elementwise, out: Row, tasks: Sequence[int], shared: Sequence[bool] | None
) -> Later:
    """An elementwise method on the shared parameters, the sum on the others; groups make no difference to either."""
    method.check_tasks(len(tasks))
    inside = [True] * len(out) if shared is None else shared
    gram = columns.gram([0 if chosen else -1 for chosen in inside], 1)[0]
    method.merge_blocks(columns.tensors, [place if own else None for place, own in zip(out, inside, strict=True)])
    outside = [not chosen for chosen in inside]
    if any(outside):
        rest = list(compress(out, outside))
        columns.only(outside).combine(gram.new_ones(1, len(tasks)), [0] * len(rest), rest)
    return lambda: Figures(gram, gram.new_full((len(tasks),), torch.nan))


def _problems(
    method: Method, everywhere: Sequence[bool], shared: Sequence[bool] | None, groups: Sequence[int] | None
) -> list[int | None]:
    """The problem of each parameter, numbered from 0; None where its gradients are summed."""
    count = len(everywhere)
    if method.scope == "parameter":
        groups = range(count)
    elif groups is None:
        groups = [0] * count
    if shared is None:
        shared = everywhere if method.scope == "shared" else [True] * count
    numbers = {group: n for n, group in enumerate(sorted(set(compress(groups, shared))))}
    return [numbers[group] if inside else None for group, inside in zip(groups, shared, strict=True)]
