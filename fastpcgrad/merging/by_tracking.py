"""Methods that keep something as large as J: what they make of the rows is merged."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import compress
from types import MappingProxyType

import torch
from torch import Tensor

from .._blocks import addresses
from .._modes import is_fake
from .._ops import Figures
from ..distributed.exchange import Averaging, Exchange
from ..methods import Method, Tracking
from ..methods.tracking import Tracked
from ..rows.columns import Columns
from ..rows.task_gradients import Row
from .problems import SUMMED, Problems
from .report import ConflictReport

Losses = Mapping[int, Tensor]
"""Of each task its loss in this round, as far as they are known."""
NO_LOSSES: Losses = MappingProxyType({})


def check_one_process(method: Method, exchange: Exchange | Averaging | None) -> None:
    """NotImplementedError where others have parts of the rows: of what is kept a checkpoint would hold a part too."""
    if exchange is not None and isinstance(method, Tracking):
        raise NotImplementedError(
            f"{type(method).__name__} keeps something of each column of the task gradients, which here lie in several "
            "processes: use it in one process, or with process_group='local', where each merges what it has by itself"
        )


def merge_tracked(
    columns: Columns,
    tasks: Sequence[int],
    losses: Losses,
    method: Tracking,
    problems: Problems,
    out: Row,
    parameters: Sequence[Tensor],
) -> ConflictReport:
    """The merged gradient into ``out``, in which places may be filled that were None.

    Args:
        parameters: whose gradients the columns are.
    Raises:
        ValueError: several problems, sparse gradients, losses that are not known; see ``Tracking.check_parameters``.
    """
    _check(columns, method, problems)
    inside = [problem != SUMMED for problem in problems.of]
    own = columns.only(inside)
    _check_losses(method, tasks, losses)
    rows = [list(row) for row in own.tensors]
    method.check_parameters(list(compress(parameters, inside)), rows, own.widths)
    gram = own.gram(None, 1)[0]
    places = list(compress(out, inside))
    is_sound = not is_fake(gram) and bool(gram.isfinite().all())
    values = [float(losses[task].detach()) for task in tasks] if is_sound and method.needs_losses else []
    tracked = method.track(tasks, rows, gram, values) if is_sound else None
    if tracked is None:
        weights = gram.new_full((len(tasks),), torch.nan)
        own.combine(weights[None], None, places)
        report = ConflictReport(tuple(tasks), lambda: Figures(gram, weights))
    else:
        report, places = _merged(own, tracked, method, places)
    if not all(inside):
        outside = [not chosen for chosen in inside]
        columns.only(outside).combine(gram.new_ones(1, len(tasks)), None, list(compress(out, outside)))
    merged = iter(places)
    out[:] = [next(merged) if chosen else place for place, chosen in zip(out, inside, strict=True)]
    return report


def _merged(columns: Columns, tracked: Tracked, method: Tracking, out: Row) -> tuple[ConflictReport, Row]:
    """The report, and ``out`` with what of it is new."""
    tasks, rows = tracked.tasks, [*tracked.rows, *tracked.besides]
    firsts = [next((own for own in column if own is not None), None) for column in zip(*rows, strict=True)]
    places = [_place(own, place) for own, place in zip(firsts, out, strict=True)]
    dtypes = [dtype if own is None else own.dtype for own, dtype in zip(firsts, columns.dtypes, strict=True)]
    kept = Columns(rows, [addresses(row) for row in rows], array("q", columns.widths), dtypes, columns.devices)
    gram = kept.gram(None, 1)[0]
    solution = kept.solve(method, gram, tasks)
    kept.combine(solution.weights[None], None, places)
    method.finish(places)
    for index, (place, dtype) in enumerate(zip(out, columns.dtypes, strict=True)):
        made = places[index]
        if made is not None and made is not place:
            places[index] = made.to(dtype) if place is None else place.copy_(made)
    count = len(tasks)
    own = solution.coefficients
    figures = Figures(gram[:count, :count], solution.weights[:count], None if own is None else own[:count, :count])
    return ConflictReport(tuple(tasks), lambda: figures), places


def _place(kept: Tensor | None, place: Tensor | None) -> Tensor | None:
    """Where the merged gradient of a parameter comes: to ``place`` if that will do."""
    if kept is None or (place is not None and place.dtype == kept.dtype):
        return place
    return torch.empty_like(kept)


def _check(columns: Columns, method: Tracking, problems: Problems) -> None:
    name = type(method).__name__
    if problems.are_many:
        raise ValueError(f"{name} takes all parameters as one problem: leave granularity 'model'")
    if columns.touched:
        raise ValueError(
            f"{name} keeps something of each column, also of those that sparse gradients leave out: sparse=False"
        )


def _check_losses(method: Tracking, tasks: Sequence[int], losses: Losses) -> None:
    if method.needs_losses and (unknown := [task for task in tasks if task not in losses]):
        raise ValueError(
            f"{method!r} needs the values of the losses, and those of tasks {unknown} are not known: give losses or "
            "functions to backward(), or losses to pc_backward(), instead of running them inside task(t)"
        )
