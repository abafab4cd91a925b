"""backward and grad, as torch.autograd has them, for several task losses and one merged gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import methods
from ._graph import check_kept, explain, nodes, refuse_reentrant
from .functional import check_losses, check_tensors
from .merging import merge
from .task_gradients import TaskGradients


def grad(
    losses: Sequence[Tensor] | Tensor,
    inputs: Sequence[Tensor] | Tensor,
    *,
    method: methods.Method | None = None,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The merged gradient of several task losses with respect to ``inputs``; no ``.grad`` is touched.

    Args:
        losses: T scalar losses, or one tensor ``[T]``; they may share a graph.
        inputs: tensors that require grad, of one device and dtype; need not be leaves.
        method: makes weights of the Gram matrix; None: ``methods.PCGrad()``.
        retain_graph: keep the graphs for another backward pass; else the last pass frees them.
    Returns:
        for each input its merged gradient, None for one that no loss depends on.
    Raises:
        TypeError, ValueError: see ``functional.check_losses``; inputs without grad, of several devices or dtypes.
        RuntimeError: a reentrant checkpoint hides what lies behind it.
    Memory: (T + 1)·N·itemsize bytes, allocated anew in each call; N·itemsize remain. A training loop is faster with
        ``GradientSurgery`` or ``PCGrad``, which keep their rows.
    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastpcgrad.grad([x[0] - x[1], x[1]], [x])
        (tensor([1.5000, 0.5000]),)
    """
    found = check_losses(losses)
    targets = _check_inputs([inputs] if isinstance(inputs, Tensor) else inputs)
    _leaves(found)  # for its error
    merged = _merged(found, targets, method, retain_graph)
    return tuple(merged[id(target)] for target in targets)


def backward(
    losses: Sequence[Tensor] | Tensor,
    inputs: Sequence[Tensor] | Tensor | None = None,
    *,
    method: methods.Method | None = None,
    retain_graph: bool = False,
) -> None:
    """Add the merged gradient of several task losses to ``.grad``, as ``torch.autograd.backward`` adds.

    Args:
        losses: T scalar losses, or one tensor ``[T]``; they may share a graph.
        inputs: leaves that require grad; None: all leaves of the graphs.
        method, retain_graph: see ``grad``.
    Raises:
        TypeError, ValueError, RuntimeError: see ``grad``; inputs that are no leaves. ``.grad`` is not changed.
    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastpcgrad.backward([x[0] - x[1], x[1]])
        >>> x.grad
        tensor([1.5000, 0.5000])
    """
    found = check_losses(losses)
    leaves = _leaves(found)
    targets = leaves if inputs is None else _check_inputs([inputs] if isinstance(inputs, Tensor) else inputs)
    for target in targets:
        if not target.is_leaf:
            raise ValueError(f"inputs of backward must be leaves; found {list(target.shape)} with {target.grad_fn}")
    merged = _merged(found, targets, method, retain_graph)
    with torch.no_grad():
        for target in {id(target): target for target in targets}.values():
            new, old = merged[id(target)], target.grad
            if new is not None and old is not None:
                new = old.add_(new) if old.layout == torch.strided else new.add_(old)
            target.grad = old if new is None else new


def _merged(
    losses: Sequence[Tensor], targets: Sequence[Tensor], method: methods.Method | None, retain_graph: bool
) -> dict[int, Tensor | None]:
    """The merged gradient by the id of its input; an input that stands there twice counts once."""
    method = methods.check_method(method, methods.PCGrad)
    inputs = list({id(target): target for target in targets}.values())
    grads = TaskGradients(inputs)
    if retain_graph or len(losses) > 1:
        check_kept(losses)
    try:
        for t, loss in enumerate(losses):
            keep = retain_graph or t < len(losses) - 1
            grads.put(t, list(torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True)))
    except RuntimeError as error:
        explain(error)
        raise
    # Not in place: what autograd.grad returns may be a tensor of the graph's own.
    _, merged = merge(grads, method, in_place=False)
    return dict(zip(map(id, inputs), merged, strict=True))


def _check_inputs(inputs: Iterable[Any]) -> list[Tensor]:
    found = check_tensors("inputs", inputs)
    if not found:
        raise ValueError("inputs must hold at least one tensor; found none")
    for i, value in enumerate(found):
        if not value.requires_grad:
            raise ValueError(f"inputs[{i}] does not require grad")
    return found


def _leaves(losses: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that the losses depend on; RuntimeError where a reentrant checkpoint hides some."""
    found: dict[int, Tensor] = {id(loss): loss for loss in losses if loss.is_leaf}
    for node in nodes(losses):
        refuse_reentrant(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
    return list(found.values())
