"""What a trainer is told about the surgery: the same for every trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .._graph import leaf_of, nodes_behind
from .._tasks import check_tasks
from ..merging.report import ConflictReport
from ..methods import Method, PCGrad, check_method
from ..monitor import ConflictMonitor
from ..optimizer import PCGrad as Wrapper
from ..surgery import GradientSurgery


@dataclass
class Surgery:
    """How a trainer is to merge task gradients.

    Args:
        tasks: names of the tasks, or how many there are. None: as a dict of datasets or the first dict of losses has
            them; those of a column in alphabetical order, which counts where a method has a number for each.
        task_key: what a row of the data has its task in, by name or by index; where a micro-batch is of one task.
        method: makes weights of the Gram matrix; None: ``methods.PCGrad()``, which sums as the paper does. Against
            ``methods.PCGrad(reduction="mean")`` and ``fastpcgrad.PCGrad(optimizer)`` that is T times the length.
        normalize: where a micro-batch is of one task. ``task``: the gradient of a task is the mean over its own
            micro-batches, or over its own tokens, however many there are of the others. ``batch``: each loss is divided
            as the trainer divides it, by what all tasks have together, so that their sum is what the trainer takes.
        options: further arguments of ``GradientSurgery``, such as ``{"granularity": "layer"}``; ``model`` is there, and
            ``parallel`` is ``"data"``: trainers give each process its part of every batch.
        monitor: notes the report of each merge, and its averages are logged where the reports are.
    Raises:
        TypeError, ValueError: see ``GradientSurgery``; another ``normalize``.
    """

    tasks: Sequence[str] | int | None = None
    task_key: str = "task_id"
    method: Method | None = None
    normalize: Literal["task", "batch"] = "task"
    options: Mapping[str, Any] = field(default_factory=dict)
    monitor: ConflictMonitor | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None:
            check_tasks(None, self.tasks)
        if self.normalize not in ("task", "batch"):
            raise ValueError(f"normalize must be 'task' or 'batch'; found {self.normalize!r}")
        check_method(self.method, PCGrad)
        if self.options.get("parallel", "data") != "data":
            raise ValueError(
                f"options has parallel={self.options['parallel']!r}, and trainers give each process its part of every "
                "batch: share tasks out by fastpcgrad.GradientSurgery in a loop of your own (docs/distributed.md)"
            )
        if taken := {"tasks", "num_tasks", "method"} & set(self.options):
            raise ValueError(
                f"options are further arguments of GradientSurgery; found {sorted(taken)}, of Surgery itself"
            )

    def on(self, optimizer: Any, model: nn.Module | None, tasks: Sequence[str] | int | None = None) -> GradientSurgery:
        """The surgery on the parameters of an optimizer.

        Args:
            optimizer: as the trainer has prepared it.
            model: whose layers are meant.
            tasks: their names, where there are none here.
        Raises:
            TypeError: the optimizer is a ``fastpcgrad.PCGrad`` already.
        """
        refuse_wrapper(optimizer)
        names = tasks if self.tasks is None else self.tasks
        options = {"model": model, **self.options}
        return GradientSurgery(optimizer, tasks=names, method=self.method, **options)

    def merged(self, surgery: GradientSurgery) -> ConflictReport:
        """The report of a merge, noted."""
        report = surgery.merge()
        if self.monitor is not None:
            self.monitor.note(report)
        return report

    def figures(self, report: ConflictReport) -> dict[str, float]:
        """For a log."""
        return report.as_dict() | ({} if self.monitor is None else self.monitor.log())


def refuse_wrapper(optimizer: Any) -> None:
    """TypeError for ``PCGrad(optimizer)``, also below what a trainer has wrapped it in."""
    inner = optimizer
    while inner is not None:
        if isinstance(inner, Wrapper):
            raise TypeError(
                "found fastpcgrad.PCGrad(optimizer) where the integration does the surgery: give the optimizer itself"
            )
        inner = getattr(inner, "optimizer", None)


def factor_of(loss: Tensor, total: GradientEdge | None) -> Tensor:
    """What the sum of the tasks' losses was multiplied by until it became ``loss``: a trainer's share of an
    accumulation, a scale.

    Args:
        total: see ``total_of``.
    Raises:
        RuntimeError: something else is part of the loss, whose gradient would be in no row.
    """
    top = loss.grad_fn
    if total is None or top is None or top is total.node:
        return torch.ones_like(loss)
    besides = _besides(top, total.node)
    factor, *others = torch.autograd.grad(loss, [total, *besides], retain_graph=True, allow_unused=True)
    if factor is None or _come_to_something(besides, others):
        raise RuntimeError(
            "the loss that was returned is no multiple of the sum that the dict of losses gave, and what else is in it "
            "would have no part in the surgery: put it into the dict, as a task or as part of a task's loss, and give "
            "all losses of a batch in one dict"
        )
    return factor


def _come_to_something(edges: Sequence[GradientEdge], gradients: Sequence[Tensor | None]) -> bool:
    """Whether some leaf has a gradient other than zeros where these come in at the edges."""
    there = {edge: grad for edge, grad in zip(edges, gradients, strict=True) if grad is not None}
    if not there:
        return False
    accumulators = [node for node in nodes_behind(edge.node for edge in there) if leaf_of(node) is not None]
    leaves = [GradientEdge(node, 0) for node in accumulators]
    found = torch.autograd.grad(list(there), leaves, list(there.values()), retain_graph=True, allow_unused=True)
    return any(grad is not None and bool(grad.any()) for grad in found)


def _besides(top: Node, goal: Node) -> list[GradientEdge]:
    """The edges that branch off a way from one node down to another; all from the first where there is no such way."""
    way, seen = [(top, iter(top.next_functions))], {top}
    while way and way[-1][0] is not goal:
        child = next((child for child, _ in way[-1][1] if child is not None and child not in seen), None)
        if child is None:
            way.pop()
        else:
            seen.add(child)
            way.append((child, iter(child.next_functions)))
    nodes = [node for node, _ in way] or [top, goal]
    return [
        GradientEdge(child, number)
        for node, below in pairwise(nodes)
        for child, number in node.next_functions
        if child is not None and child is not below
    ]


def as_run_by(backward: Callable[[Tensor], Any], losses: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Losses as a trainer's backward pass takes them: multiplied by its share of an accumulation and its scale.

    The pass itself is the surgery's, of which a module that averages over processes once a forward sees nothing.
    """
    scaled = {}
    for task, loss in losses.items():
        probe = torch.ones_like(loss).requires_grad_()
        backward(probe)
        factor = probe.grad
        assert factor is not None
        scaled[task] = loss * factor
    return scaled


def total_of(losses: Mapping[str, Tensor | None]) -> tuple[Tensor, GradientEdge | None]:
    """The sum of those that are there, and by what it is known in a graph, whatever is done to it in place; None where
    there is none.

    Raises:
        ValueError: none is.
    """
    present = [loss for loss in losses.values() if loss is not None]
    if not present:
        raise ValueError(f"losses must hold a task that is not absent; found {dict(losses)}")
    first = present[0] * 1  # a tensor of its own, so that what became of it can be told from the loss
    total = sum(present[1:], first)
    return total, get_gradient_edge(total) if total.requires_grad else None
