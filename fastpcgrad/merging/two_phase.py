"""Surgery with about one gradient in memory: first G, piece by piece of the graph, then one weighted backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import compress
from math import isfinite

import torch
from torch import Tensor
from torch.utils import checkpoint

from .._graph import check_kept, explain
from .._losses import check_losses, check_tensors
from .._modes import is_fake
from .._ops import Figures
from ..methods import Method
from ..rows.capture import MovedCapture
from ..rows.layout import Layout
from ..rows.parameters import UNDIVIDED, Division, Learning
from ..rows.reach import Found
from ..rows.sparse import stays_sparse
from ..rows.task_gradients import Row, TaskGradients
from .graph_pieces import Graph, Open
from .problems import PARTIAL, SUM, SUMMED, WHOLE, Problems, weights_table
from .report import ConflictReport

_ROWS = len((WHOLE, PARTIAL, SUM))
_KINDS = 2 * _ROWS
"""G is kept by itself for each piece of the graph and each row of weights: for row k of piece p as number
p·_KINDS + k, and p·_KINDS + _ROWS + k of parameters that the method's G does not look at."""

# Within one, a checkpointed block is recomputed once; without one, once in each piece that it is part of.
_Recomputed = getattr(checkpoint, "GraphExecGroup", nullcontext)


def check_one_problem(forwards: Iterable[int], granularity: object) -> None:
    """TypeError for tasks that have functions instead of losses, ValueError for several problems."""
    if forwards:
        raise TypeError(f"two_phase needs losses, not functions; found functions for tasks {list(forwards)}")
    if granularity != "model":
        raise ValueError(f"two_phase solves one problem; found granularity={granularity!r}")


def check_no_rows(layout: Layout, *chosen: object) -> None:
    """Before losses are merged so: no process has all gradients of several, nor are rows that are kept nowhere moved.

    Args:
        chosen: how rows are moved.
    Raises:
        NotImplementedError, ValueError: see above.
    """
    if layout.exchange is not None:
        raise NotImplementedError(
            f"two_phase has no gradients of several processes, here {layout.exchange}, before its last backward pass: "
            "leave it False"
        )
    if isinstance(layout.capture, MovedCapture):
        raise ValueError(
            "two_phase keeps no rows: leave row_dtype, row_device and accumulate_dtype None; found "
            + ", ".join(map(str, chosen))
        )


def merge_in_two_phases(
    losses: Sequence[Tensor] | Tensor,
    parameters: Sequence[Tensor],
    method: Method,
    *,
    tasks: Sequence[int] | None = None,
    division: Division | Learning = UNDIVIDED,
    retain_graph: bool = False,
) -> tuple[ConflictReport, Row]:
    """Merge the gradients of several losses without ever holding all of them.

    First the graph is run backward for all tasks at once, one piece after the other: the gradients of the parameters
    of a piece become products in G and are freed. Then the method makes weights w of G, and one backward pass of all
    losses, each weighted, gives the merged gradient.

    Args:
        losses: T scalar losses, or one tensor ``[T]`` or ``[T, 1]``; of one graph or of several.
        parameters: leaves, each once, on one device; may be of several dtypes.
        method: makes weights of the Gram matrix.
        tasks: the index of each loss's task, ascending; None: its place.
        division: which parameters undergo surgery; all that do form one problem.
        retain_graph: keep the graph for another backward pass.
    Returns:
        the report, and for each parameter its merged gradient, None where it has none. ``.grad`` is as it was.
    Raises:
        TypeError: bad losses or parameters; a method that needs the rows.
        ValueError: bad losses or parameters; a loss that reaches none of the parameters; a method that works on each
            parameter by itself; hooks that wait for a parameter's gradient; a graph that cannot be cut so that at least
            half of the rows' memory is saved.
        RuntimeError: a backward pass that is not linear, see below; a reentrant checkpoint; a compiled model whose
            graph cannot be kept.
    Memory: N elements for the merged gradient, and before it T times what a piece holds: N / T elements, or its
        largest parameter if that is larger; besides T gradients of the activations where pieces meet. A parameter
        that several pieces use (tied weights) is held T times until the last of them has run, and a checkpointed block
        that was cut keeps what is left of its activations for each task.
    Time: T + 1 backward passes, and reading each task gradient once. Parameters that need other weights than the rest
        (summed ones, or for some methods those that only some tasks touch) take one more pass, no deeper than they
        lie. Checkpointed blocks are recomputed once in each of these passes.
    Numerics: w is rounded to the dtype of each loss. What comes out is checked piece by piece: ‖m‖² must be wᵀ G w up
        to a thousandth of (Σ |w_t| ‖g_t‖)², or four units of the coarsest dtype on the way, and rounding. It is not
        where a hook or a custom function changes gradients in a way that is not linear. A hook on an activation at
        which the graph is cut does not run exactly once, and is found out the same way unless it changes nothing.
    """
    found = check_losses(losses)
    _check_method(method)
    _check_parameters(parameters)
    check_kept(found)
    graph = Graph(found, parameters)
    indices = tuple(range(len(found)) if tasks is None else tasks)
    try:
        places, grams = _gram_of_each_place(graph, found, parameters, method, indices, division)
    except RuntimeError as error:
        explain(error)
        raise
    gram = grams[WHOLE::_KINDS].sum(dim=0) + grams[PARTIAL::_KINDS].sum(dim=0)
    solution = method.checked_solve(gram, indices)
    weights = weights_table(method, solution.weights)
    alike = method.partial_weights(solution.weights) is solution.weights
    rows = [WHOLE, WHOLE if alike else PARTIAL, SUM]  # what takes the same weights takes one pass
    chosen = [rows[place % _ROWS] if place >= 0 else -1 for place in places]
    merged = _weighted_backward(found, parameters, chosen, weights, retain_graph)
    _check_linear(parameters, places, grams, weights, merged, graph.dtypes | _autocast_dtypes(found))
    return ConflictReport(indices, lambda: Figures(gram, *solution)), merged


def _autocast_dtypes(losses: Sequence[Tensor]) -> set[torch.dtype]:
    """What backward passes here round to besides, as long as autocast is on."""
    kinds = {loss.device.type for loss in losses}
    return {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def _check_method(method: Method) -> None:
    if method.needs_rows:
        raise TypeError(f"method must work on the Gram matrix in two phases; found {method!r}, which needs the rows")
    if method.scope == "parameter":
        raise ValueError(f"method must have one problem in two phases; found {method!r}, which has one a parameter")


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    TaskGradients(parameters)  # for its errors
    for index, p in enumerate(check_tensors("parameters", parameters)):
        if not p.is_leaf:
            raise ValueError(f"parameters must be leaves of the graph; found parameters[{index}] with {p.grad_fn}")
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"parameters[{index}] has a post-accumulate-grad hook, which in two phases would never see the "
                "gradient of a task; remove the hook, or merge in one phase"
            )


def _gram_of_each_place(
    graph: Graph,
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    method: Method,
    tasks: Sequence[int],
    division: Division | Learning,
) -> tuple[list[int], Tensor]:
    """The number of each parameter's G, see ``_KINDS``, -1 without a gradient, and all G: ``[·, T, T]``."""
    count = len(losses)
    pieces = list(graph.pieces(max(graph.largest, graph.width // count)))
    _check_held(max(piece.held for piece in pieces), graph.width, count)
    places = [-1] * len(parameters)
    device = parameters[0].device if parameters else losses[0].device
    grams = torch.zeros(len(pieces) * _KINDS, count, count, dtype=torch.float64, device=device)
    gradients: list[Open] = [{root: torch.ones_like(loss)} for root, loss in zip(graph.roots, losses, strict=True)]
    # The pieces of one task do not overlap: a checkpointed block that was cut in two is recomputed only once.
    groups = [_Recomputed() for _ in losses]
    rows: list[Row] = [[] for _ in losses]
    unreached = set(range(count))
    for number, piece in enumerate(pieces):
        for t, (group, there) in enumerate(zip(groups, gradients, strict=True)):
            rows[t] = []  # frees those of the last piece just before their memory is needed again
            with group:
                piece.run(there)
            rows[t] = [there.pop(graph.leaves[index], None) for index in piece.complete]
        touched = [[row[column] is not None for row in rows] for column in range(len(piece.complete))]
        own_parameters = [parameters[index] for index in piece.complete]
        found = Found(tasks, touched.__getitem__, partial(_squares, own_parameters, rows))
        own_division = division.of(piece.complete).settled(found)
        problems = Problems.made(method, list(map(all, touched)), own_division)
        kinds = [
            row + _ROWS * (problem == SUMMED)
            for row, problem in zip(problems.row_of_each, problems.in_gram, strict=True)
        ]
        for index, reached, kind in zip(piece.complete, touched, kinds, strict=True):
            unreached.difference_update(compress(range(count), reached))
            if any(reached):
                places[index] = number * _KINDS + kind
        own = grams[number * _KINDS : (number + 1) * _KINDS]
        _add_products(own, own_parameters, rows, kinds)
    if unreached:
        raise ValueError(
            f"losses {sorted(unreached)} reach none of the parameters through the graph; where a hook runs the "
            "backward pass (cached losses), merge in one phase"
        )
    known = Found(tasks, lambda index: (), partial(_squares, parameters, []))
    division.settled(known)  # all that there is to learn is known: refuses what cannot be
    return places, grams


def _squares(parameters: Sequence[Tensor], rows: Sequence[Row], asked: Sequence[int]) -> Tensor:
    """Of some parameters the squared norm of each task's gradient, ``[k, T]``."""
    chosen = [parameters[index] for index in asked]
    each = torch.zeros(len(asked), len(rows), len(rows), dtype=torch.float64, device=chosen[0].device)
    _add_products(each, chosen, [[row[index] for index in asked] for row in rows], range(len(asked)))
    return each.diagonal(dim1=-2, dim2=-1)


def _check_held(held: int, width: int, tasks: int) -> None:
    """ValueError where less than half of the memory of T rows would be saved."""
    if tasks * held > max(width, tasks * width // 2):
        raise ValueError(
            f"two phases would hold {held} of {width} elements of all {tasks} task gradients at once, more than half, "
            "for the graph cannot be cut into smaller pieces: one parameter is that large or used all over the "
            "graph, or the whole model was compiled as one; merge in one phase"
        )


def _add_products(grams: Tensor, parameters: Sequence[Tensor], rows: Sequence[Row], places: Sequence[int]) -> None:
    """Add the products of some parameters' gradients to the Gram matrix at each one's place."""
    dtypes = [next((grad.dtype for grad in column if grad is not None), None) for column in zip(*rows, strict=True)]
    for dtype in dict.fromkeys(dtypes):
        chosen = [index for index, found in enumerate(dtypes) if dtype is not None and found == dtype]
        if chosen:
            grads = TaskGradients([parameters[index] for index in chosen], dtype)
            for t, row in enumerate(rows):
                grads.put(t, [row[index] for index in chosen])
            grams += grads.columns().gram([places[index] for index in chosen], len(grams))


def _weighted_backward(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    rows: Sequence[int],
    weights: Tensor,
    retain_graph: bool,
) -> Row:
    """The sum of the task gradients with each parameter's row of ``weights``, -1: none; one backward pass a row."""
    passes: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row >= 0:
            passes.setdefault(row, []).append(index)
    merged: Row = [None] * len(parameters)
    for number, (row, chosen) in enumerate(passes.items(), start=1):
        inputs = [parameters[index] for index in chosen]
        seeds = [own.to(loss).reshape(loss.shape) for own, loss in zip(weights[row].detach(), losses, strict=True)]
        # By way of .grad, for then autograd makes sure that nothing else uses a gradient's memory.
        with _grad_set_aside(inputs):
            torch.autograd.backward(losses, seeds, retain_graph=retain_graph or number < len(passes), inputs=inputs)
            for index, p in zip(chosen, inputs, strict=True):
                merged[index] = p.grad if p.grad is None or not stays_sparse(p.grad) else p.grad.coalesce()
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
    places: Sequence[int],
    grams: Tensor,
    weights: Tensor,
    merged: Row,
    dtypes: set[torch.dtype],
) -> None:
    """RuntimeError where ‖m‖² is not wᵀ G w at some place.

    Where G is not finite but m is, what overflowed in a task gradient did not in the weighted pass; m becomes NaN, for
    it must be seen.
    """
    if is_fake(grams):  # no numbers to look at
        return
    squares = grams.new_zeros(len(grams), 1, 1)
    _add_products(squares, parameters, [merged], places)
    weights = weights.repeat(len(grams) // _ROWS, 1)
    expected = torch.einsum("pi,pij,pj->p", weights, grams, weights)
    lengths = weights.abs() * grams.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = lengths.sum(dim=-1).square()
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    # Where exact gradients would be zero (a bias before a normalisation) they are rounding errors of the others.
    allowed = max(1e-3, 4 * unit) * scale + (8 * unit) ** 2 * lengths.norm(dim=0).sum().square()
    figures = torch.stack([squares.flatten(), expected, allowed, grams.sum(dim=(1, 2))], dim=1).tolist()
    for place, (square, wanted, tolerance, entries) in enumerate(figures):
        if abs(square - wanted) > tolerance:
            raise RuntimeError(
                f"the squared norm of a part of the merged gradient is {square:.6g}; the Gram matrix of the task "
                f"gradients wants {wanted:.6g}: a hook or a custom function makes the backward pass not linear in what "
                "comes in, or there is a hook on an activation at which the graph was cut; merge in one phase"
            )
        if isfinite(square) and not isfinite(entries):
            for index, own in enumerate(merged):
                if own is not None and places[index] == place:
                    merged[index] = own * torch.nan  # anew: a hook may hold the gradient
