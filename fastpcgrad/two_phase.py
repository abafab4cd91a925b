"""Surgery with about one gradient in memory: first G, piece by piece of the graph, then one weighted backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

from ._ops import KERNELS
from .functional import check_losses, check_tensors
from .graph_pieces import Graph, Open
from .methods import Elementwise, Method
from .report import ConflictReport
from .task_gradients import Row, TaskGradients

# What becomes of a parameter: all tasks touch it, only some do, or its gradients are summed.
_WHOLE, _PARTIAL, _SUMMED = range(3)


def two_phase(
    losses: Sequence[Tensor] | Tensor,
    parameters: Sequence[Tensor],
    method: Method,
    *,
    shared: Sequence[bool] | None = None,
    retain_graph: bool = False,
) -> tuple[ConflictReport, Row]:
    """Merge the gradients of several losses without ever holding all of them.

    First the graph is run backward for all tasks at once, one piece after the other: the gradients of the parameters
    of a piece become products in G and are freed. Then the method makes weights w of G, and one backward pass of all
    losses, each weighted, gives the merged gradient.

    Args:
        losses: T scalar losses, or one tensor ``[T]``; of one graph or of several.
        parameters: leaves, each once, on one device; may be of several dtypes.
        method: makes weights of the Gram matrix.
        shared: for each parameter whether it undergoes surgery; the others are summed. None: the method's scope.
        retain_graph: keep the graph for another backward pass.
    Returns:
        the report, and for each parameter its merged gradient, None where it has none. ``.grad`` is as it was.
    Raises:
        TypeError: bad losses or parameters; a method that needs the rows.
        ValueError: bad losses or parameters; a method that works on each parameter by itself; hooks that wait for a
            parameter's gradient; a graph that cannot be cut so that at least half of the rows' memory is saved.
        RuntimeError: a backward pass that is not linear, see below; a reentrant checkpoint; a compiled model whose
            graph cannot be kept.
    Memory: N elements for the merged gradient, and before it T times what a piece holds: N / T elements, or its
        largest parameter if that is larger; besides T gradients of the activations where pieces meet. A parameter
        that several pieces use (tied weights) is held T times until the last of them has run.
    Time: T + 1 backward passes, and reading each task gradient once. Parameters that need other weights than the rest
        (summed ones, or for some methods those that only some tasks touch) take one more pass, no deeper than they
        lie. Checkpointed blocks are recomputed once in each of these passes.
    Numerics: w is rounded to the dtype of each loss. What comes out is checked: ‖m‖² must be wᵀ G w up to a
        thousandth of (Σ |w_t| ‖g_t‖)², or four units of the coarsest dtype on the way. It is not where a hook or a
        custom function changes gradients in a way that is not linear. A hook on an activation at which the graph is
        cut runs twice, and is found out the same way unless it changes nothing.
    """
    tasks = check_losses(losses)
    _check_method(method)
    _check_parameters(parameters)
    graph = Graph(tasks, parameters)
    kinds, grams = _gram_of_each_kind(graph, tasks, parameters, method, shared)
    gram = grams[_WHOLE] + grams[_PARTIAL]
    solution = method.checked_solve(gram)
    weights = [solution.weights, method.partial_weights(solution.weights), torch.ones_like(solution.weights)]
    merged = _weighted_backward(tasks, parameters, kinds, weights, retain_graph)
    _check_linear(parameters, kinds, grams, torch.stack(weights), merged, graph.dtypes)
    return ConflictReport(tuple(range(len(tasks))), gram, solution.weights, solution.coefficients, None), merged


def _check_method(method: Method) -> None:
    if isinstance(method, Elementwise):
        raise TypeError(f"method must work on the Gram matrix in two phases; found {method!r}, which needs the rows")
    if method.scope == "parameter":
        raise ValueError(f"method must have one problem in two phases; found {method!r}, which has one a parameter")


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    for index, p in enumerate(check_tensors("parameters", parameters)):
        if not p.is_leaf:
            raise ValueError(f"parameters must be leaves of the graph; found parameters[{index}] with {p.grad_fn}")
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"parameters[{index}] has a post-accumulate-grad hook, which in two phases would never see the "
                "gradient of a task; remove the hook, or merge in one phase"
            )


def _gram_of_each_kind(
    graph: Graph,
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    method: Method,
    shared: Sequence[bool] | None,
) -> tuple[list[int | None], Tensor]:
    """The kind of each parameter, None without a gradient, and G over those of each kind: ``[3, T, T]``."""
    count = len(losses)
    pieces = list(graph.pieces(max(graph.largest, graph.width // count)))
    _check_held(max(piece.held for piece in pieces), graph.width, count)
    kinds: list[int | None] = [None] * len(parameters)
    device = parameters[0].device if parameters else losses[0].device
    grams = torch.zeros(3, count, count, dtype=torch.float64, device=device)
    gradients: list[Open] = [{root: torch.ones_like(loss)} for root, loss in zip(graph.roots, losses, strict=True)]
    # The pieces of one task do not overlap: a checkpointed block that was cut in two is recomputed only once.
    groups = [GraphExecGroup() for _ in losses]
    rows: list[Row] = [[] for _ in losses]
    for piece in pieces:
        for t, (group, there) in enumerate(zip(groups, gradients, strict=True)):
            rows[t] = []  # frees those of the last piece just before their memory is needed again
            with group, _donated_buffers_explained():
                piece.run(there)
            rows[t] = [there.pop(graph.leaves[index], None) for index in piece.complete]
        for index, column in zip(piece.complete, zip(*rows, strict=True), strict=True):
            everywhere = all(grad is not None for grad in column)
            chosen = everywhere or method.scope != "shared" if shared is None else shared[index]
            if any(grad is not None for grad in column):
                kinds[index] = _SUMMED if not chosen else _WHOLE if everywhere else _PARTIAL
        _add_products(grams, [parameters[i] for i in piece.complete], rows, [kinds[i] for i in piece.complete])
    return kinds, grams


def _check_held(held: int, width: int, tasks: int) -> None:
    """ValueError where less than half of the memory of T rows would be saved."""
    if tasks * held > max(width, tasks * width // 2):
        raise ValueError(
            f"two phases would hold {held} of {width} elements of all {tasks} task gradients at once, more than half, "
            "for the graph cannot be cut into smaller pieces: one parameter is that large or used all over the "
            "graph, or the whole model was compiled as one; merge in one phase"
        )


@contextmanager
def _donated_buffers_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "the graph of a compiled model was asked for more than one backward pass: set "
            "torch._functorch.config.donated_buffer = False before the model is compiled"
        ) from error


def _add_products(
    grams: Tensor, parameters: Sequence[Tensor], rows: Sequence[Row], kinds: Sequence[int | None]
) -> None:
    """Add the products of some parameters' gradients to the Gram matrix of each kind."""
    dtypes = [next((grad.dtype for grad in column if grad is not None), None) for column in zip(*rows, strict=True)]
    for dtype in dict.fromkeys(dtypes):
        chosen = [index for index, found in enumerate(dtypes) if dtype is not None and found == dtype]
        if chosen:
            grads = TaskGradients([parameters[index] for index in chosen], dtype)
            for t, row in enumerate(rows):
                grads.put(t, [row[index] for index in chosen])
            grams += KERNELS["gram_blocks"](grads.blocks(), [kinds[index] for index in chosen], len(grams))


def _weighted_backward(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    kinds: Sequence[int | None],
    weights: Sequence[Tensor],
    retain_graph: bool,
) -> Row:
    """The sum of the task gradients with each parameter's weights: one backward pass for all that share them."""
    passes: dict[int, tuple[Tensor, list[int]]] = {}
    for index, kind in enumerate(kinds):
        if kind is not None:
            passes.setdefault(id(weights[kind]), (weights[kind], []))[1].append(index)
    merged: Row = [None] * len(parameters)
    for number, (w, chosen) in enumerate(passes.values(), start=1):
        inputs = [parameters[index] for index in chosen]
        seeds = [own.to(loss).reshape(loss.shape) for own, loss in zip(w.detach(), losses, strict=True)]
        # By way of .grad, for then autograd makes sure that nothing else uses a gradient's memory.
        with _grad_set_aside(inputs):
            torch.autograd.backward(losses, seeds, retain_graph=retain_graph or number < len(passes), inputs=inputs)
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
    kinds: Sequence[int | None],
    grams: Tensor,
    weights: Tensor,
    merged: Row,
    dtypes: set[torch.dtype],
) -> None:
    """RuntimeError where ‖m‖² is not wᵀ G w.

    Where G is not finite but m is, what overflowed in a task gradient did not in the weighted pass; m becomes NaN, for
    it must be seen.
    """
    squares = torch.zeros(3, 1, 1, dtype=grams.dtype, device=grams.device)
    _add_products(squares, parameters, [merged], kinds)
    expected = torch.einsum("ki,kij,kj->k", weights, grams, weights)
    scale = (weights.abs() * grams.diagonal(dim1=-2, dim2=-1).sqrt()).sum(dim=-1).square()
    tolerance = max([1e-3, *(4 * torch.finfo(dtype).eps for dtype in dtypes)])
    figures = torch.stack([squares.flatten(), expected, scale, grams.sum(dim=(1, 2))], dim=1).tolist()
    for kind, (square, wanted, whole, entries) in enumerate(figures):
        if abs(square - wanted) > tolerance * whole:
            raise RuntimeError(
                f"the squared norm of the merged gradient is {square:.6g}; the Gram matrix of the task gradients wants "
                f"{wanted:.6g}: a hook or a custom function makes the backward pass not linear in what comes in, or a "
                "hook on an activation ran twice; merge in one phase"
            )
        if isfinite(square) and not isfinite(entries):
            for own in (grad for grad, found in zip(merged, kinds, strict=True) if found == kind and grad is not None):
                own.mul_(torch.nan)
