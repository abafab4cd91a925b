"""Rows and a method in, the merged gradient out: which parameters form one problem, and who is summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from . import functional
from .methods import Method
from .report import ConflictReport
from .task_gradients import TaskGradients


@dataclass(frozen=True)
class _Run:
    """Neighbouring columns up to ``end`` with one problem (None: summed) and one presence."""

    end: int
    problem: int | None
    everywhere: bool


def merge(
    grads: TaskGradients,
    method: Method,
    out: Tensor,
    shared: Sequence[bool] | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[ConflictReport, list[bool]]:
    """Write the merged gradient of all filled rows to ``out`` ``[N]``, which may be one of the rows.

    Args:
        grads: the rows, filled; what tasks did not touch is zeroed.
        method: makes weights of a Gram matrix.
        shared: for each parameter whether it undergoes surgery; the others are summed. None: the method's scope.
        groups: for each parameter the problem (0..) that it belongs to; None: one problem, or the method's scope.
    Returns:
        the report, and for each parameter whether it has a merged gradient.
    """
    complete = grads.close()
    in_order = grads.tasks == sorted(grads.tasks)
    if complete and in_order and shared is groups is None and method.scope != "parameter":
        gram, solution = method.merge(grads.rows, out)
        report = ConflictReport(tuple(grads.tasks), gram, solution.weights, solution.coefficients, None)
        return report, [True] * len(grads.places)

    tasks = len(grads.tasks)
    touches = [sum(column) for column in zip(*map(grads.touched, range(tasks)), strict=True)]
    everywhere = [count == tasks for count in touches]
    problems = _problems(method, everywhere, shared, groups)
    runs = _runs(grads, problems, everywhere)
    segments = _on(grads.device, [0, *(run.end for run in runs)]) if len(runs) > 1 else None
    by_problem = groups is not None or method.scope == "parameter"

    gram = _grams(grads.rows, segments, runs, by_problem)
    ascending = sorted(range(tasks), key=grads.tasks.__getitem__)
    if not in_order:  # methods see tasks in their own order, not in that of their arrival
        gram = gram[..., ascending, :][..., ascending]
    solution = method.solve(gram)
    weights = solution.weights
    if not in_order:
        weights = weights[..., sorted(range(tasks), key=ascending.__getitem__)]
    functional.combine(grads.rows, _run_weights(weights, runs, method), out, segments=segments)

    total, per_problem = (gram.sum(dim=0), gram) if by_problem else (gram, None)
    report = ConflictReport(tuple(sorted(grads.tasks)), total, solution.weights, solution.coefficients, per_problem)
    drop_partial = method.scope == "parameter"
    kept = [
        count > 0 and (whole or problem is None or not drop_partial)
        for count, whole, problem in zip(touches, everywhere, problems, strict=True)
    ]
    return report, kept


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


def _runs(grads: TaskGradients, problems: Sequence[int | None], everywhere: Sequence[bool]) -> list[_Run]:
    runs: list[_Run] = []
    for p in grads.by_offset:
        place = grads.places[p]
        run = _Run(place.offset + place.length, problems[p], everywhere[p])
        if runs and (runs[-1].problem, runs[-1].everywhere) == (run.problem, run.everywhere):
            runs.pop()
        runs.append(run)
    return runs or [_Run(0, 0, True)]


def _grams(rows: Tensor, segments: Tensor | None, runs: Sequence[_Run], by_problem: bool) -> Tensor:
    """``[T, T]`` over all runs that undergo surgery, or ``[S, T, T]``, one for each problem."""
    inside = [r for r, run in enumerate(runs) if run.problem is not None]
    if not by_problem and len(inside) == len(runs):
        return functional.gram(rows)
    grams = functional.gram(rows, segments)
    grams = grams[None] if segments is None else grams
    if not by_problem:
        return grams[inside].sum(dim=0)
    owners = [run.problem for run in runs if run.problem is not None]
    if owners == list(range(len(runs))):
        return grams
    result = grams.new_zeros(max(owners, default=-1) + 1, *grams.shape[1:])
    return result.index_put_((_on(rows.device, owners),), grams[inside], accumulate=True)


def _run_weights(weights: Tensor, runs: Sequence[_Run], method: Method) -> Tensor:
    """The weights of each run ``[R, T]``; ``[T]`` for a single run."""
    each = weights[None] if weights.dim() == 1 else weights
    if len(each) == 0:  # nothing undergoes surgery
        each = each.new_ones(1, each.shape[1])
    if len(runs) > 1 or len(each) > 1:
        each = each[[run.problem or 0 for run in runs]]
    partial = [run.problem is not None and not run.everywhere for run in runs]
    summed = [run.problem is None for run in runs]
    if any(partial):
        each = torch.where(_column(partial, each), method.partial_weights(each), each)
    if any(summed):
        each = torch.where(_column(summed, each), 1.0, each)
    return each if len(runs) > 1 else each[0]


def _column(flags: Sequence[bool], like: Tensor) -> Tensor:
    return torch.tensor(flags, device="cpu")[:, None].to(like.device)


def _on(device: torch.device, values: Sequence[int | None]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)
