"""A round of losses whose weights are kept as factors, from ``.grad`` into rows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor

from .._graph import run_backward
from .capture import Capture
from .factors import Factors
from .stacked import Trial, Trunk, find_trunk, may_stack, run_stacked


def run_factored(losses: Mapping[int, Tensor], retain_graph: bool, capture: Capture, factors: Factors) -> None:
    """Each loss backward inside its task, but not to the weights; together from where the tasks meet, if they may."""
    trunk = find_trunk(factors)
    factors.why_looped = trunk if isinstance(trunk, str) else may_stack(factors, trunk)
    if isinstance(trunk, Trunk) and factors.why_looped is None:
        rows = run_stacked(factors, trunk, list(losses.values()), retain_graph)
        for index in losses:
            capture.rows.take(index)
            capture.keep(index, rows.pop(0))
    else:
        _run_each(losses, retain_graph, capture, factors, Trial.of(factors, trunk))
    capture.rows.factors = factors


def _run_each(
    losses: Mapping[int, Tensor], retain_graph: bool, capture: Capture, factors: Factors, trial: Trial | None
) -> None:
    parameters, left = capture.parameters, len(losses)
    with factors.noting(), nullcontext() if trial is None else trial.watching():
        for slot, (index, loss) in enumerate(losses.items()):
            left -= 1
            if trial is not None and left == 0:
                trial.finish([capture.rows.row(before) for before in capture.rows.tasks])
            capture.open(index)
            run_backward(loss, retain_graph or left > 0, factors.begin(slot))
            for done in factors.compare([parameters[unknown].grad for unknown in factors.unknown]):
                parameters[done].grad = None
            capture.close()
