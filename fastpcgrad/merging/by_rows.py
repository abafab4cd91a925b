"""Rows and a method in, the merged gradient out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter

import torch

from .._blocks import Blocks
from .._memory import prefer_huge_pages
from .._ops import Figures, Later, flat, to_device
from ..backends import kernels
from ..methods import Elementwise, Method
from ..rows.parameters import UNDIVIDED, Division
from ..rows.task_gradients import Row, TaskGradients
from .problems import SUMMED, Problems, weights_table
from .report import ConflictReport

_VERSION = attrgetter("_version")


def merge(
    grads: TaskGradients, method: Method, division: Division = UNDIVIDED, *, in_place: bool
) -> tuple[ConflictReport, Row]:
    """Merge all rows.

    Args:
        grads: the rows, of one task or more.
        method: makes weights of a Gram matrix.
        division: which parameters form which problem.
        in_place: write the merged gradient over that of the first task that has one, for each parameter; else to
            fresh memory.
    Returns:
        the report, and for each parameter its merged gradient, None where it has none.
    Raises:
        Whatever the method raises. Where rows have been written by then, and after an interrupt, ``grads`` is at risk.
    """
    blocks = grads.blocks()
    complete = not any(0 in row for row in blocks.pointers)
    whole = [True] * len(blocks.widths) if complete else _everywhere(blocks)
    problems = Problems.made(method, whole, division)
    out = list(blocks.tensors[0]) if complete else _first_of_each(blocks)
    if not in_place:
        out = [None if place is None else prefer_huge_pages(torch.empty_like(place)) for place in out]
        return _merge(blocks, tuple(grads.tasks), method, problems, out)
    before = _versions(out)
    grads.at_risk = True
    try:
        return _merge(blocks, tuple(grads.tasks), method, problems, out)
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
    blocks: Blocks, tasks: tuple[int, ...], method: Method, problems: Problems, out: Row
) -> tuple[ConflictReport, Row]:
    if isinstance(method, Elementwise):
        return ConflictReport(tasks, _merge_columns(blocks, method, tasks, problems, out)), out
    projections = method.projections(len(tasks)) if problems.is_one_for_all else None
    if projections is not None:
        order, guards, scale = projections
        if blocks.device.type != "cpu":
            order = to_device(order, blocks.device)
        return ConflictReport(tasks, kernels.pcgrad_blocks(blocks, order, guards, scale, out)), out
    return _merge_by_weights(blocks, tasks, method, problems, out)


def _merge_by_weights(
    blocks: Blocks, tasks: tuple[int, ...], method: Method, problems: Problems, out: Row
) -> tuple[ConflictReport, Row]:
    is_one = problems.is_one_for_all
    grams = kernels.gram_blocks(blocks, None if is_one else problems.of, problems.count)
    gram = grams if problems.are_many else grams[0]
    solution = method.checked_solve(gram, tasks)
    if is_one:
        kernels.combine_blocks(blocks, solution.weights[None], None, out)
    else:
        table = weights_table(method, solution.weights)
        kernels.combine_blocks(blocks, table, problems.row_of_each, out)

    def figures() -> Figures:
        return Figures(grams.sum(dim=0), *solution, grams) if problems.are_many else Figures(gram, *solution)

    if method.scope == "parameter":  # one that some task does not have gets no gradient
        kept = zip(out, problems.of, problems.whole, strict=True)
        out = [place if whole or p == SUMMED else None for place, p, whole in kept]
    return ConflictReport(tasks, figures), out


def _merge_columns(blocks: Blocks, method: Elementwise, tasks: Sequence[int], problems: Problems, out: Row) -> Later:
    """An elementwise method on the parameters that undergo surgery, the sum on the others; the weights are NaN.

    Which of them form one problem makes no difference to either. A task without a gradient of a parameter counts as
    zero there.
    """
    method.check_tasks(len(tasks))
    outside = [problem == SUMMED for problem in problems.of]
    inside = [not summed for summed in outside]
    chosen = _some(blocks, inside) if any(outside) else blocks
    gram = kernels.gram_blocks(chosen, None, 1)[0]
    for place, column in zip(compress(out, inside), zip(*chosen.tensors, strict=True), strict=True):
        if place is not None:
            method.merge_rows([None if grad is None else flat(grad) for grad in column], flat(place))
    if any(outside):
        ones = torch.ones(1, len(blocks.tensors), dtype=torch.float64, device=blocks.device)
        kernels.combine_blocks(_some(blocks, outside), ones, None, list(compress(out, outside)))
    return lambda: Figures(gram, gram.new_full((len(tasks),), torch.nan))


def _everywhere(blocks: Blocks) -> list[bool]:
    """For each parameter whether every task has a gradient."""
    return [all(grad is not None for grad in column) for column in zip(*blocks.tensors, strict=True)]


def _first_of_each(blocks: Blocks) -> Row:
    """For each parameter the gradient of the first task that has one."""
    return [next((grad for grad in column if grad is not None), None) for column in zip(*blocks.tensors, strict=True)]


def _some(blocks: Blocks, chosen: Sequence[bool]) -> Blocks:
    return blocks._replace(
        tensors=[list(compress(row, chosen)) for row in blocks.tensors],
        pointers=[list(compress(row, chosen)) for row in blocks.pointers],
        widths=array("q", compress(blocks.widths, chosen)),
    )
