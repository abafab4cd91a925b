"""Which parameters' task gradients are kept as factors, and which of those are settled so when it comes to merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .._modes import is_fake, is_on
from .._torch import backward_is_compiled
from ..distributed.processes import is_initialized
from ..methods import Method, Tracking
from ..rows.choice import LEAST_ELEMENTS, Choice, RowsReport, in_force, is_large
from ..rows.factors import Factors, all_dense, plan
from ..rows.products import Graph
from ..rows.samples import find_samples, grams
from ..rows.task_gradients import TaskGradients


class Factor(Protocol):
    """The task gradients of one parameter as factors."""

    @property
    def reached(self) -> Sequence[bool]:
        """For each task whether it has a gradient."""

    def merged(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of the gradients with these weights, ``[T]`` float64."""


Settled = Mapping[int, tuple[Factor, Tensor]]
"""Parameters that stay factors by their index, each with its G, ``[T, T]`` float64."""
NOTHING: Settled = MappingProxyType({})


def planned(
    losses: Mapping[int, Tensor], parameters: Sequence[Tensor], method: Method, rows: Choice
) -> Factors | RowsReport:
    """How to run losses backward with factors, or why all task gradients are to be kept as they are.

    Args:
        losses: scalars that require grad.
        parameters: see ``rows.factors.plan``.
        method: what is to merge them.
        rows: what was asked for.
    """
    rows = in_force(rows)
    if rows == "factored" and isinstance(method, Tracking):
        raise ValueError(f"{type(method).__name__} keeps something of each task gradient: leave rows 'auto' or 'dense'")
    if rows == "dense":
        return all_dense("rows='dense'", len(parameters))
    if rows == "auto" and not is_large(parameters):
        return all_dense(f"the model's matrices have less than {LEAST_ELEMENTS} elements", len(parameters))
    found = list(losses.values())
    if reason := "one loss" if len(found) < 2 else _why_not(found, parameters, method, rows):
        return all_dense(reason, len(parameters))
    return plan(found, parameters, rows)


def _why_not(losses: Sequence[Tensor], parameters: Sequence[Tensor], method: Method, rows: Choice) -> str | None:
    if method.needs_rows:
        return "the method works on each column of the task gradients"
    if is_initialized():
        return "several processes"
    if rows == "auto" and not all(p.is_cpu for p in parameters):
        return "not measured on this device"
    if is_on() or any(map(is_fake, losses)) or has_torch_function(losses):
        return "a mode, a transform or a subclass of Tensor"
    if backward_is_compiled():
        return "the backward pass is compiled"
    return None


def sampled(
    graph: Graph, losses: Tensor, parameters: Sequence[Tensor], method: Method, retain_graph: bool, rows: Choice
) -> Settled:
    """Parameters of which the gradients of one loss a sample are factors; of all others there are to be rows.

    Args:
        graph: of the losses.
        losses: ``[B]``.
        retain_graph: keep their graph also where no rows are to be made.
        parameters, method, rows: see ``planned``. A backward pass a sample is what factors save, so that ``auto``
            always takes them.
    Raises:
        ValueError: see ``rows.samples.find_samples``.
    """
    if in_force(rows) == "dense" or _why_not([losses], parameters, method, "factored"):
        return NOTHING
    found = find_samples(graph, losses, parameters, retain_graph)
    return {index: (found[index], gram) for index, gram in grams(found).items()}


def settled(grads: TaskGradients, method: Method) -> Settled:
    """G of each weight that stays factors; the others become rows of ``grads``.

    Where G would be too far from that of rows (activations with a mean far above their deviations, and Σ δ_t = 0; or
    float64 gradients), or where something is not finite, the gradients themselves are made. So they are where a
    backward pass has left some gradient of such a weight in ``.grad``, which no graph shows: that of a custom function
    which runs another backward pass.
    """
    kept: dict[int, tuple[Factor, Tensor]] = {}
    assert grads.factors is not None
    for index, weight in list(grads.factors.weights.items()):
        if not method.needs_rows and not grads.has_rows_of(index):
            gram, is_exact = weight.gram()
            if is_exact:
                kept[index] = weight, gram
                continue
        for task, reached, delta in zip(grads.tasks, weight.reached, weight.delta, strict=True):
            if reached:
                grads.add_to(task, index, weight.product(delta).to(grads.dtypes[index]))
        grads.factors.leave_out(index, "factors would not have been exact")
    return kept
