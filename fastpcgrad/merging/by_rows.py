"""Rows and a method in, the merged gradient out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import compress
from operator import attrgetter

import torch
from torch import Tensor

from .._memory import prefer_huge_pages
from .._ops import Figures, Later, flat
from ..backends import kernels
from ..distributed.exchange import Averaging, Exchange
from ..methods import Elementwise, Method, Tracking
from ..rows.columns import Columns, Tensors
from ..rows.parameters import UNDIVIDED, Division, Learning
from ..rows.reach import Found
from ..rows.task_gradients import Row, TaskGradients
from .by_factors import NOTHING, Settled, settled
from .by_tracking import NO_LOSSES, Losses, check_one_process, merge_tracked
from .problems import SUMMED, Problems, weights_table
from .report import ConflictReport

_VERSION = attrgetter("_version")


def merge(
    grads: TaskGradients,
    method: Method,
    division: Division | Learning = UNDIVIDED,
    *,
    in_place: bool,
    exchange: Exchange | Averaging | None = None,
    parameters: Sequence[Tensor] = (),
) -> tuple[ConflictReport, Row]:
    """Merge all rows.

    Args:
        grads: the rows, of one task or more.
        method: makes weights of a Gram matrix.
        division: which parameters form which problem.
        in_place: write the merged gradient over that of the first task that has one, for each parameter; else to
            fresh memory.
        exchange: with the processes that have other columns of J; None: nobody has.
        parameters: whose gradients the rows are, for methods that keep something of each.
    Returns:
        the report, and for each parameter its merged gradient, None where it has none.
    Raises:
        Whatever the method raises. Where rows have been written by then, and after an interrupt, ``grads`` is at risk.
    """
    check_one_process(method, exchange)
    factors = settled(grads, method) if grads.factors else NOTHING
    columns = grads.columns() if exchange is None else exchange.over(grads.columns())
    if not in_place:
        return merge_apart(columns, factors, tuple(grads.tasks), method, division, grads.losses(), parameters)
    tasks = tuple(grads.tasks)
    out, problems = _prepared(columns, factors, tasks, method, division)
    before = _versions(out)
    grads.at_risk = True
    try:
        report, merged = _merge(columns, factors, tasks, method, problems, out, grads.losses(), parameters)
        return report, columns.gradients(merged)
    except Exception:
        grads.at_risk = _versions(out) != before
        raise


def merge_apart(
    columns: Columns,
    factors: Settled,
    tasks: tuple[int, ...],
    method: Method,
    division: Division | Learning = UNDIVIDED,
    losses: Losses = NO_LOSSES,
    parameters: Sequence[Tensor] = (),
) -> tuple[ConflictReport, Row]:
    """Into fresh memory, see ``merge``."""
    out, problems = _prepared(columns, factors, tasks, method, division)
    out = [None if place is None else prefer_huge_pages(torch.empty_like(place)) for place in out]
    report, merged = _merge(columns, factors, tasks, method, problems, out, losses, parameters)
    return report, columns.gradients(merged)


def _prepared(
    columns: Columns, factors: Settled, tasks: tuple[int, ...], method: Method, division: Division | Learning
) -> tuple[Row, Problems]:
    """Of each parameter a gradient that is there, and the problems."""
    complete = not any(0 in row for row in columns.pointers)
    whole = [True] * len(columns.widths) if complete else _everywhere(columns.tensors)
    for index, (weight, _) in factors.items():
        whole[index] = all(weight.reached)
    out = list(columns.tensors[0]) if complete else _first_of_each(columns.tensors)

    def touched(index: int) -> Iterable[bool]:
        return factors[index][0].reached if index in factors else (row[index] is not None for row in columns.tensors)

    def squares(asked: Sequence[int]) -> torch.Tensor:
        place = {index: number for number, index in enumerate(asked)}
        each = columns.gram([-1 if n in factors else place.get(n, -1) for n in range(len(whole))], len(asked))
        for index in factors.keys() & place.keys():
            each[place[index]].add_(factors[index][1].to(each.device))
        return each.diagonal(dim1=-2, dim2=-1)

    return out, Problems.made(method, whole, division.settled(Found(tasks, touched, squares)))


def gram(columns: Columns, factors: Settled) -> torch.Tensor:
    """G alone, ``[T, T]`` float64."""
    inside = [index not in factors for index in range(len(columns.widths))]
    grams = [own for _, own in factors.values()]
    if any(inside) or not grams:
        grams.append(columns.only(inside).gram(None, 1)[0])
    total = grams[0].clone()
    for own in grams[1:]:
        total += own.to(total.device)
    return total


def _versions(out: Row) -> list[int]:
    """What autograd counts the writes to each tensor with."""
    try:
        return list(map(_VERSION, out))
    except (AttributeError, RuntimeError):  # a None; an inference tensor, which has no such count
        return [0 if place is None or place.is_inference() else place._version for place in out]


def _merge(
    columns: Columns,
    factors: Settled,
    tasks: tuple[int, ...],
    method: Method,
    problems: Problems,
    out: Row,
    losses: Losses,
    parameters: Sequence[Tensor],
) -> tuple[ConflictReport, Row]:
    if isinstance(method, Tracking):
        return merge_tracked(columns, tasks, losses, method, problems, out, parameters), out
    if isinstance(method, Elementwise):
        return ConflictReport(tasks, _merge_columns(columns, method, tasks, problems, out)), out
    blocks = columns.fused if problems.is_one_for_all and not factors else None
    projections = None if blocks is None else method.projections(len(tasks), blocks.device)
    if blocks is not None and projections is not None:
        order, guards, scale = projections
        return ConflictReport(tasks, kernels.pcgrad_blocks(blocks, order, guards, scale, out)), out
    each = parameters if method.scope == "parameter" else ()
    return _merge_by_weights(columns, factors, tasks, method, problems, out, each)


def _merge_by_weights(
    columns: Columns,
    factors: Settled,
    tasks: tuple[int, ...],
    method: Method,
    problems: Problems,
    out: Row,
    each_parameter: Sequence[Tensor],
) -> tuple[ConflictReport, Row]:
    """``each_parameter``: where each is a problem by itself, these."""
    is_one = problems.is_one_for_all
    dtypes = columns.dtypes
    if factors:
        inside = [index not in factors for index in range(len(out))]
        rest = list(compress(out, inside))
        columns = columns.only(inside) if rest else columns
        in_gram, row_of_each = list(compress(problems.in_gram, inside)), list(compress(problems.row_of_each, inside))
    else:
        rest, in_gram, row_of_each = out, problems.in_gram, [] if is_one else problems.row_of_each
    if rest or not factors:
        grams = columns.gram(None if is_one else in_gram, problems.count)
    else:
        grams = torch.zeros(problems.count, len(tasks), len(tasks), dtype=torch.float64)
    for index, (_, own) in factors.items():
        if problems.in_gram[index] != SUMMED:
            grams[problems.in_gram[index]].add_(own.to(grams.device))
    gram = grams if problems.are_many else grams[0]
    with method.solving(problems.known_by, each_parameter) if problems.are_many else nullcontext():
        solution = columns.solve(method, gram, tasks)
    table = solution.weights[None] if is_one and not factors else weights_table(method, solution.weights)
    if rest:
        columns.combine(table, row_of_each if len(table) > 1 else None, rest)
    each = table.unbind() if factors else ()
    for index, (weight, _) in factors.items():
        out[index] = weight.merged(each[problems.row_of_each[index]], dtypes[index])

    def figures() -> Figures:
        return Figures(grams.sum(dim=0), *solution, grams) if problems.are_many else Figures(gram, *solution)

    if method.scope == "parameter":  # one that some task does not have gets no gradient
        kept = zip(out, problems.of, problems.whole, strict=True)
        out = [place if whole or p == SUMMED else None for place, p, whole in kept]
    return ConflictReport(tasks, figures, problems.names), out


def _merge_columns(columns: Columns, method: Elementwise, tasks: Sequence[int], problems: Problems, out: Row) -> Later:
    """An elementwise method on the parameters that undergo surgery, the sum on the others; the weights are NaN.

    Which of them form one problem makes no difference to either. A task without a gradient of a parameter counts as
    zero there.
    """
    method.check_tasks(len(tasks))
    outside = [problem == SUMMED for problem in problems.of]
    inside = [not summed for summed in outside]
    gram = columns.gram([min(problem, 0) for problem in problems.of], 1)[0]  # one over all problems
    drawing = columns.drawing(method)
    for index, (place, column) in enumerate(zip(out, zip(*columns.tensors, strict=True), strict=True)):
        if place is not None and inside[index]:
            drawing(index).merge_rows([None if grad is None else flat(grad) for grad in column], flat(place))
    if any(outside):
        columns.only(outside).combine(gram.new_ones(1, len(tasks)), None, list(compress(out, outside)))
    return lambda: Figures(gram, gram.new_full((len(tasks),), torch.nan))


def _everywhere(tensors: Tensors) -> list[bool]:
    """For each parameter whether every task has a gradient."""
    return [all(grad is not None for grad in column) for column in zip(*tensors, strict=True)]


def _first_of_each(tensors: Tensors) -> Row:
    """For each parameter the gradient of the first task that has one."""
    return [next((grad for grad in column if grad is not None), None) for column in zip(*tensors, strict=True)]
