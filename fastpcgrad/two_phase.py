"""Surgery with about one gradient in memory: first G, piece by piece of the graph, then one weighted backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

from ._ops import KERNELS, Figures
from .functional import check_losses, check_tensors
from .graph_pieces import Graph, Open
from .methods import Elementwise, Method
from .report import ConflictReport
from .task_gradients import Row, TaskGradients

# A parameter's class: every task touches it, some do not, or its gradients are summed.
_WHOLE, _PARTIAL, _SUMMED = range(3)


def two_phase(
    losses: Sequence[Tensor] | Tensor,
    parameters: Sequence[Tensor],
    method: Method,
    *,
    tasks: Sequence[int] | None = None,
    shared: Sequence[bool] | None = None,
    retain_graph: bool = False,
) -> tuple[ConflictReport, Row]:
    """Merge the gradients of several losses without ever holding all of them.

    Args:
        losses: T scalar losses, or one tensor ``[T]``; of one graph or of several.
        parameters: leaves, each once.
        method: makes weights of the Gram matrix.
        tasks: the index of each loss's task, ascending; None: its place.
        shared: for each parameter whether it undergoes surgery; the others are summed. None: the method's scope.
        retain_graph: keep the graph for another backward pass.
    Returns:
        the report, and for each parameter its merged gradient, None where it has none. ``.grad`` is as it was.
    """
    found = check_losses(losses)
    _check_method(method)
    _check_parameters(parameters)
    graph = Graph(found, parameters)
    classes, grams = _grams(graph, found, parameters, method, shared)
    gram = grams[_WHOLE] + grams[_PARTIAL]
    indices = tuple(range(len(found)) if tasks is None else tasks)
    solution = method.checked_solve(gram, indices)
    weights = [solution.weights, method.partial_weights(solution.weights), torch.ones_like(solution.weights)]
    merged = _weighted_backward(found, parameters, classes, weights, retain_graph)
    _check_linear(parameters, classes, grams, weights, merged, graph)
    return ConflictReport(indices, lambda: Figures(gram, *solution)), merged


def _check_method(method: Method) -> None:
    if isinstance(method, Elementwise):
        raise TypeError(f"two_phase knows the task gradients by their Gram matrix alone; {method!r} needs the rows")
    if method.scope == "parameter":
        raise ValueError(f"two_phase merges all parameters with the same weights; {method!r} has some for each")


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    for index, p in enumerate(check_tensors("parameters", parameters)):
        if not p.is_leaf:
            raise ValueError(f"parameters must be leaves of the graph; found parameters[{index}] with {p.grad_fn}")
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"parameters[{index}] has a hook that runs when its gradient is there; two_phase has no gradient of "
                "a single task to give it"
            )


def _grams(
    graph: Graph,
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    method: Method,
    shared: Sequence[bool] | None,
) -> tuple[list[int | None], Tensor]:
    """Each parameter's class, None without a gradient, and G of each class: ``[3, T, T]``."""
    count = len(losses)
    largest = max((p.numel() for p, leaf in zip(parameters, graph.leaves, strict=True) if leaf), default=0)
    pieces = list(graph.pieces(max(largest, graph.width // count)))
    _check_held(max(piece.held for piece in pieces), graph.width, count)
    gradients: list[Open] = [{root: torch.ones_like(loss)} for root, loss in zip(graph.roots, losses, strict=True)]
    groups = [GraphExecGroup() for _ in losses]
    classes: list[int | None] = [None] * len(parameters)
    device = parameters[0].device if parameters else losses[0].device
    grams = torch.zeros(3, count, count, dtype=torch.float64, device=device)
    rows: list[Row] = [[] for _ in losses]
    for piece in pieces:
        for t, open_ in enumerate(gradients):
            rows[t] = []  # the last piece's are freed one by one, each just before its successor is made
            with groups[t]:
                piece.run(open_)
            edges = [graph.leaves[index] for index in piece.complete]
            rows[t] = [open_.pop(edge, None) for edge in edges]  # type: ignore[arg-type]
        for column, index in enumerate(piece.complete):
            there = [row[column] is not None for row in rows]
            if any(there):
                chosen = shared[index] if shared is not None else all(there) or method.scope != "shared"
                classes[index] = _SUMMED if not chosen else _WHOLE if all(there) else _PARTIAL
        grams += _products([parameters[i] for i in piece.complete], rows, [classes[i] for i in piece.complete])
    return classes, grams


def _check_held(held: int, width: int, tasks: int) -> None:
    """ValueError where less than half of the memory of T rows would be saved."""
    if tasks * held > max(width, tasks * width // 2):
        raise ValueError(
            f"two_phase would hold {held} of {width} elements of all {tasks} task gradients at once, because the graph "
            "cannot be cut into smaller pieces (one large or tied parameter, or a compiled model, which is one node): "
            "less than half of the memory would be saved; merge without two_phase"
        )


def _products(parameters: Sequence[Tensor], rows: Sequence[Row], classes: Sequence[int | None]) -> Tensor:
    """G of each class, ``[3, T, T]``, of the gradients of some parameters."""
    dtypes = [next((grad.dtype for grad in column if grad is not None), None) for column in zip(*rows, strict=True)]
    total = None
    for dtype in sorted(set(dtypes) - {None}, key=str):
        chosen = [index for index, found in enumerate(dtypes) if found is dtype]
        grads = TaskGradients([parameters[index] for index in chosen], dtype)
        for t, row in enumerate(rows):
            grads.put(t, [row[index] for index in chosen])
        found = KERNELS["gram_blocks"](grads.blocks(), [classes[index] for index in chosen], 3)
        total = found if total is None else total + found
    return torch.zeros(3, len(rows), len(rows), dtype=torch.float64) if total is None else total


def _weighted_backward(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    classes: Sequence[int | None],
    weights: Sequence[Tensor],
    retain_graph: bool,
) -> Row:
    """The sum of the task gradients with each parameter's weights: one backward pass for all that share them."""
    passes: dict[int, tuple[Tensor, list[int]]] = {}
    for index, kind in enumerate(classes):
        if kind is not None:
            passes.setdefault(id(weights[kind]), (weights[kind], []))[1].append(index)
    merged: Row = [None] * len(parameters)
    for number, (w, chosen) in enumerate(passes.values()):
        inputs = [parameters[index] for index in chosen]
        seeds = [own.to(loss).reshape(loss.shape) for own, loss in zip(w.detach(), losses, strict=True)]
        keep = retain_graph or number < len(passes) - 1
        with _grad_set_aside(inputs):
            torch.autograd.backward(losses, seeds, retain_graph=keep, inputs=inputs)
            for index, p in zip(chosen, inputs, strict=True):
                merged[index] = p.grad
    return merged


@contextmanager
def _grad_set_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def _check_linear(
    parameters: Sequence[Tensor],
    classes: Sequence[int | None],
    grams: Tensor,
    weights: Sequence[Tensor],
    merged: Row,
    graph: Graph,
) -> None:
    """RuntimeError where ‖m‖² is not wᵀ G w: the backward pass is no linear function of what comes in.

    What is not finite in a task's gradient but is in m makes m NaN: an overflow must be seen.
    """
    found = _products(parameters, [merged], classes)[:, 0, 0]
    table = torch.stack(list(weights))
    expected = torch.einsum("ci,cij,cj->c", table, grams, table)
    scale = (table.abs() * grams.diagonal(dim1=-2, dim2=-1).sqrt()).sum(dim=-1).square()
    tolerance = max([1e-3, *(4 * torch.finfo(dtype).eps for dtype in graph.dtypes)])
    for kind, (f, e, s, g) in enumerate(torch.stack([found, expected, scale, grams.sum(dim=(1, 2))], dim=1).tolist()):
        if abs(f - e) > tolerance * s:
            raise RuntimeError(
                f"the squared norm of the merged gradient is {f:.6g}, but by the Gram matrix of the task gradients it "
                f"must be {e:.6g}: the backward pass is not linear in the incoming gradient (a hook or a custom "
                "function changes it), or a hook on an activation ran twice; merge without two_phase"
            )
        if f - f == 0 and g - g != 0:
            for p, own in zip(classes, merged, strict=True):
                if p == kind and own is not None:
                    own.fill_(torch.nan)
