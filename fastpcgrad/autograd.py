"""backward and grad, as torch.autograd has them, for several task losses and one merged gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import methods
from ._gradients import added
from ._graph import check_kept, explain, leaves, refuse_reentrant, run_grad
from ._losses import check_losses_of_samples, check_reached, check_tensors, present_losses
from ._modes import not_compiled
from ._warnings import warn_of_fewer_losses, warn_of_one_loss
from .distributed.exchange import Exchange, OutOfStep, Rounds
from .distributed.groups import group_of_graph
from .distributed.local_tensors import Part
from .distributed.processes import check_graph
from .merging.by_factors import NOTHING, Settled, planned, sampled, settled
from .merging.by_rows import gram, merge, merge_apart
from .merging.problems import check_scopes
from .rows.choice import Choice, check_rows
from .rows.columns import Columns
from .rows.factors import Factors
from .rows.parameters import Division, Learning, Scope, Scopes, divide
from .rows.products import Graph
from .rows.reach import Reach
from .rows.sharded import ShardedGradients
from .rows.task_gradients import Row, TaskGradients


@not_compiled
def grad(
    losses: Sequence[Tensor | None] | Tensor,
    inputs: Sequence[Tensor] | Tensor,
    *,
    method: methods.Method | None = None,
    retain_graph: bool = False,
    process_group: object = "auto",
    rows: Choice = "auto",
    batch_dim: int | None = None,
    shared: Scope | Tensor = None,
    gram_over: Scope | Tensor = None,
) -> tuple[Tensor | None, ...]:
    """The merged gradient of several task losses with respect to ``inputs``; no ``.grad`` is touched.

    Args:
        losses: T scalar losses, None for a task that is absent, or one tensor ``[T]`` or ``[T, 1]``; they may share a
            graph.
        inputs: tensors that require grad; need not be leaves.
        method: makes weights of the Gram matrix; None: ``methods.PCGrad()``.
        retain_graph: keep the graphs for another backward pass; else the last pass frees them.
        process_group: over whose parts of a batch the task gradients are means. ``auto``: those processes over which
            DistributedDataParallel averages the gradients of all inputs; where there is none in several processes,
            each merges by itself, with one warning. A process group or a mesh of one dimension: that. ``local``: each
            process merges by itself.
        rows: see ``GradientSurgery``.
        batch_dim: 0: ``losses`` is one tensor with a loss for each sample of a batch, and T is the batch size. Weights
            of linear layers and their biases then take one or two backward passes for all samples together, with any
            method that needs G alone; all other parameters one for each. No loss may depend on another's sample.
        shared: those of the inputs that undergo surgery; the gradients of the others are summed. ``auto``: those of
            which two losses or more have gradients other than zeros, so that heads get those of their own. None: as
            the method's original has it (nearly all: every input).
        gram_over: those of them whose gradients G is made of, or ``auto``; the weights reach all. None: all of them.
    Returns:
        for each input its merged gradient, None for one that no loss depends on.
    Raises:
        TypeError, ValueError: see ``functional.present_losses``; inputs without grad; a loss that depends
            on none of the inputs; another ``process_group``; another ``batch_dim``, or samples that mix; ``shared`` or
            ``gram_over`` that is none of the inputs, or with a method that has no G over several of them; ``auto`` with
            losses that are None or one a sample.
        RuntimeError: a reentrant checkpoint hides what lies behind it; another process has failed in this call, or
            gave other losses. ``.grad`` is not changed.
        NotImplementedError: DistributedDataParallel averages some of the inputs and not the others, or does so with
            ``static_graph``; sharded parameters, of FSDP, fully_shard or tensor parallelism. Nothing was run.
    Warns:
        FastPCGradWarning: one loss, of which the merged gradient is its own; fewer losses than tasks for which the
            method keeps something; several processes (see above). Once.
    Memory: (T + 1)·N·itemsize bytes, allocated anew in each call; N·itemsize remain. A training loop is faster with
        ``GradientSurgery`` or ``PCGrad``, which keep their rows.
    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastpcgrad.grad([x[0] - x[1], x[1]], [x])
        (tensor([1.5000, 0.5000]),)
    """
    found = _Losses(losses, batch_dim)
    targets = _check_inputs([inputs] if isinstance(inputs, Tensor) else inputs)
    group = group_of_graph(found.leaves(), targets, process_group)
    merged = _merged(found, targets, method, retain_graph, check_rows(rows), group, shared, gram_over)
    return tuple(merged[id(target)] for target in targets)


@not_compiled
def backward(
    losses: Sequence[Tensor | None] | Tensor,
    inputs: Sequence[Tensor] | Tensor | None = None,
    *,
    method: methods.Method | None = None,
    retain_graph: bool = False,
    process_group: object = "auto",
    rows: Choice = "auto",
    batch_dim: int | None = None,
    shared: Scope | Tensor = None,
    gram_over: Scope | Tensor = None,
) -> None:
    """Add the merged gradient of several task losses to ``.grad``, as ``torch.autograd.backward`` adds.

    Args:
        losses: T scalar losses, None for a task that is absent, or one tensor ``[T]`` or ``[T, 1]``; they may share a
            graph.
        inputs: leaves that require grad; None: all leaves of the graphs.
        method, retain_graph, process_group, rows, batch_dim, shared, gram_over: see ``grad``.
    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: see ``grad``; inputs that are no leaves. ``.grad`` is
            not changed.
    Warns:
        FastPCGradWarning: see ``grad``.
    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastpcgrad.backward([x[0] - x[1], x[1]])
        >>> x.grad
        tensor([1.5000, 0.5000])
    """
    if inputs is None and isinstance(method, methods.Tracking):
        raise ValueError(
            f"inputs must be given with {type(method).__name__}, which keeps something of each: the order in which a "
            "graph has them may change"
        )
    found = _Losses(losses, batch_dim)
    behind = found.leaves()
    targets = behind if inputs is None else _check_inputs([inputs] if isinstance(inputs, Tensor) else inputs)
    for target in targets:
        if not target.is_leaf:
            raise ValueError(f"inputs of backward must be leaves; found {list(target.shape)} with {target.grad_fn}")
    group = group_of_graph(behind, targets, process_group)
    merged = _merged(found, targets, method, retain_graph, check_rows(rows), group, shared, gram_over)
    with torch.no_grad():
        for target in {id(target): target for target in targets}.values():
            new, old = merged[id(target)], target.grad
            if new is not None:
                target.grad = new if old is None else added(old, new)


@not_compiled
def gramian(
    losses: Sequence[Tensor | None] | Tensor,
    params: Sequence[Tensor] | Tensor | None = None,
    *,
    batch_dim: int | None = None,
    retain_graph: bool = False,
    process_group: object = "auto",
    rows: Choice = "auto",
) -> Tensor:
    """The Gram matrix of the task gradients alone: G_ts = ⟨g_t, g_s⟩. No ``.grad`` is touched.

    Args:
        losses: see ``grad``; of tasks that are absent there is neither row nor column.
        params: with respect to which the gradients are; None: all leaves of the graphs.
        batch_dim, retain_graph, process_group, rows: see ``grad``.
    Returns:
        ``[T, T]`` float64.
    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: see ``grad``.
    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastpcgrad.gramian([x[0] - x[1], x[1]])
        tensor([[ 2., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    found = _Losses(losses, batch_dim)
    behind = found.leaves()
    targets = behind if params is None else _check_inputs([params] if isinstance(params, Tensor) else params)
    check_graph([*behind, *targets], process_group)
    inputs = list({id(target): target for target in targets}.values())
    return gram(*_filled(found, inputs, methods.Mean(), retain_graph, check_rows(rows)))


class _Losses:
    """Task losses, by the index of the task or as one tensor with a loss for each sample of a batch.

    Raises:
        TypeError, ValueError: see ``present_losses`` and ``check_losses_of_samples``.
    """

    def __init__(self, given: Sequence[Tensor | None] | Tensor, batch_dim: int | None) -> None:
        self.given = given
        self.of_samples = None if batch_dim is None else check_losses_of_samples(given, batch_dim)
        self.tensors = present_losses(given) if self.of_samples is None else {0: self.of_samples}
        self.tasks = tuple(self.tensors) if self.of_samples is None else tuple(range(len(self.of_samples)))

    def each(self) -> Mapping[int, Tensor]:
        """By the index of the task."""
        return self.tensors if self.of_samples is None else dict(enumerate(self.of_samples.unbind()))

    @cached_property
    def graph(self) -> Graph:
        """Of one loss a sample."""
        assert self.of_samples is not None
        return Graph([self.of_samples])

    def leaves(self) -> list[Tensor]:
        """Each leaf that the losses depend on, once.

        Raises:
            RuntimeError: see ``refuse_reentrant``.
        """
        if self.of_samples is not None and not self.of_samples.is_leaf:
            for name in self.graph.names:
                refuse_reentrant(name)
            return list(self.graph.leaves.values())
        return list({id(leaf): leaf for leaf in leaves(list(self.tensors.values()))}.values())


def _merged(
    losses: _Losses,
    targets: Sequence[Tensor],
    method: methods.Method | None,
    retain_graph: bool,
    rows: Choice,
    group: Any,
    shared: Scope | Tensor,
    gram_over: Scope | Tensor,
) -> dict[int, Tensor | None]:
    """The merged gradient by the id of its input; an input that stands there twice counts once."""
    method = methods.check_method(method, methods.PCGrad)
    if losses.of_samples is not None and isinstance(method, methods.Tracking):
        raise ValueError(f"{type(method).__name__} keeps something of each task, and samples are none: no batch_dim")
    warn_of_fewer_losses(losses.given, method, method.known_tasks)
    inputs = list({id(target): target for target in targets}.values())
    division = _divided(losses, inputs, method, shared, gram_over)
    if not isinstance(method, methods.Tracking):  # which may take one task a step
        warn_of_one_loss(len(losses.tasks))
    if group is not None:
        if losses.of_samples is not None:
            raise NotImplementedError(
                "batch_dim with task gradients that are means over processes, each of which has samples of its own: "
                "pass process_group='local' to merge those of each process by itself"
            )
        merged = _merged_over(group, losses.tensors, inputs, method, retain_graph, division)
        return dict(zip(map(id, inputs), merged, strict=True))
    # Not in place: what autograd.grad returns may be a tensor of the graph's own.
    filled = _filled(losses, inputs, method, retain_graph, rows)
    _, merged = merge_apart(*filled, losses.tasks, method, division, losses.tensors, inputs)
    return dict(zip(map(id, inputs), merged, strict=True))


def _divided(
    losses: _Losses, inputs: Sequence[Tensor], method: methods.Method, shared: Scope | Tensor, gram_over: Scope | Tensor
) -> Division | Learning:
    """Which of the inputs undergo surgery, and at which G looks.

    Raises:
        TypeError, ValueError: see ``grad``.
    """
    check_scopes(method, gram_over)
    chosen = ([scope] if isinstance(scope, Tensor) else scope for scope in (shared, gram_over))
    scopes = Scopes.of(*chosen)
    if not scopes.learn:
        return divide(inputs, "model", [], scopes)
    if losses.of_samples is not None or len(losses.tasks) < len(losses.given):
        raise ValueError(
            f"'auto' needs the losses of all tasks, one by one, to find what several reach; found "
            f"{'one loss a sample' if losses.of_samples is not None else 'None for some'}: give the parameters "
            "themselves, or GradientSurgery, which remembers what absent tasks have reached"
        )
    return divide(inputs, "model", [], scopes, Reach())


def _merged_over(
    group: Any,
    losses: Mapping[int, Tensor],
    inputs: Sequence[Tensor],
    method: methods.Method,
    retain_graph: bool,
    division: Division | Learning,
) -> Row:
    """The merged gradient of means over a process group; where one of its processes fails, all do."""
    exchange = Exchange([Part(group) for _ in inputs])
    grads, rounds = ShardedGradients(inputs, None, exchange.link), exchange.rounds
    try:
        _check_losses(losses, inputs, retain_graph or len(losses) > 1)
        rounds.arrive("losses", *losses, type(method).__name__, grads.digest)
        _fill(grads, losses, inputs, retain_graph, range(len(inputs)), rounds)
        _, merged = merge(grads, method, division, in_place=True, exchange=exchange)
        return grads.whole(merged)
    except Exception as error:
        if not isinstance(error, OutOfStep):
            rounds.fail()
        explain(error)
        raise


def _check_losses(losses: Mapping[int, Tensor], inputs: Sequence[Tensor], is_kept: bool) -> None:
    """Before any is run.

    Args:
        is_kept: whether graphs are kept for further passes.
    """
    check_reached(losses, inputs)
    if is_kept:
        check_kept(list(losses.values()))


def _filled(
    losses: _Losses, inputs: Sequence[Tensor], method: methods.Method, retain_graph: bool, rows: Choice
) -> tuple[Columns, Settled]:
    """J of all losses, and the parameters that are factors instead."""
    grads = TaskGradients(inputs)
    _check_losses(losses.tensors, inputs, retain_graph or len(losses.tasks) > 1)
    try:
        if losses.of_samples is not None:
            return _filled_of_samples(grads, losses, inputs, method, retain_graph, rows)
        factors = planned(losses.tensors, inputs, method, rows)
        if isinstance(factors, Factors):
            _fill_factored(grads, losses.tensors, inputs, factors, retain_graph)
            kept = settled(grads, method)  # the others become rows
            return grads.columns(), kept
        _fill(grads, losses.tensors, inputs, retain_graph, range(len(inputs)))
    except RuntimeError as error:
        explain(error)
        raise
    return grads.columns(), NOTHING


def _filled_of_samples(
    grads: TaskGradients,
    losses: _Losses,
    inputs: Sequence[Tensor],
    method: methods.Method,
    retain_graph: bool,
    rows: Choice,
) -> tuple[Columns, Settled]:
    assert losses.of_samples is not None
    samples = sampled(losses.graph, losses.of_samples, inputs, method, retain_graph, rows)
    others = [n for n in range(len(inputs)) if n not in samples]
    if not others:
        return grads.nothing(len(losses.tasks)), samples
    _fill(grads, losses.each(), inputs, retain_graph, others)
    return grads.columns(), samples


def _fill(
    grads: TaskGradients,
    losses: Mapping[int, Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool,
    asked: Sequence[int],
    rounds: Rounds | None = None,
) -> None:
    """One backward pass a loss, to some of the inputs; the last one frees the graph.

    Args:
        asked: the places of these inputs.
        rounds: with the processes that run the same ones.
    """
    left, wanted = len(losses), [inputs[n] for n in asked]
    for t, loss in losses.items():
        left -= 1
        found = run_grad(loss, wanted, retain_graph or left > 0)
        if rounds is not None:
            rounds.arrive("loss", t)
        row = dict(zip(asked, found, strict=True))
        grads.put(t, [row.get(n) for n in range(len(inputs))])


def _fill_factored(
    grads: TaskGradients, losses: Mapping[int, Tensor], inputs: Sequence[Tensor], factors: Factors, retain_graph: bool
) -> None:
    """As ``_fill``, but weights are kept as factors."""
    factors.why_looped = "there are inputs that need not be leaves"
    left, edges = len(losses), factors.edges
    with factors.noting():
        for slot, (t, loss) in enumerate(losses.items()):
            left -= 1
            factors.begin(slot)
            asked = list(filter(factors.needs, range(len(inputs))))
            wanted: Any = [*edges, *(inputs[n] for n in asked)]
            found = run_grad(loss, wanted, retain_graph or left > 0)
            factors.note_captured(found[: len(edges)])
            row = dict(zip(asked, found[len(edges) :], strict=True))
            for done in factors.compare([row[unknown] for unknown in factors.unknown]):
                del row[done]
            grads.put(t, [row.get(n) for n in range(len(inputs))])
    grads.factors = factors


def _check_inputs(inputs: Iterable[Any]) -> list[Tensor]:
    found = check_tensors("inputs", inputs)
    if not found:
        raise ValueError("inputs must hold at least one tensor; found none")
    for i, value in enumerate(found):
        if not value.requires_grad:
            raise ValueError(f"inputs[{i}] does not require grad")
    return found
