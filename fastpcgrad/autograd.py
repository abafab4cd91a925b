"""backward and grad, as torch.autograd has them, for several task losses and one merged gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import methods
from .functional import check_losses
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
    Memory: (T + 1)·N·itemsize bytes; N·itemsize remain.
    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastpcgrad.grad([x[0] - x[1], x[1]], [x])
        (tensor([1.0000, 0.5000]),)
    """
    found = check_losses(losses)
    targets = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    _check_inputs(targets)
    merged, present = _merged(found, targets, methods.PCGrad() if method is None else method, retain_graph)
    return tuple(view if there else None for view, there in zip(merged, present, strict=True))


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
        TypeError, ValueError: see ``grad``; inputs that are no leaves. ``.grad`` is not changed.
        RuntimeError: ``inputs`` is None and a reentrant checkpoint hides the leaves behind it.
    """
    found = check_losses(losses)
    if inputs is None:
        targets = _leaves(found)
    else:
        targets = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        for t in targets:
            if isinstance(t, Tensor) and not t.is_leaf:
                raise ValueError(f"inputs of backward must be leaves; found {list(t.shape)} with {t.grad_fn}")
    _check_inputs(targets)
    merged, present = _merged(found, targets, methods.PCGrad() if method is None else method, retain_graph)
    with torch.no_grad():
        for target, view, there in zip(targets, merged, present, strict=True):
            if there:
                target.grad = view if target.grad is None else target.grad.add_(view)


def _merged(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], method: methods.Method, retain_graph: bool
) -> tuple[list[Tensor], list[bool]]:
    grads = TaskGradients(inputs, len(losses))
    for t, loss in enumerate(losses):
        keep = retain_graph or t < len(losses) - 1
        found = torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True)
        row = grads.open_row(t)
        grads.store_all(row, found)
        grads.close_row(row)
    with torch.no_grad():
        out = torch.empty(grads.width, dtype=grads.dtype, device=grads.device)
        _, present = merge(grads, method, out)
        views = [out.as_strided(place.shape, place.stride, place.offset) for place in grads.places]
    return views, present


def _check_inputs(inputs: Sequence[Any]) -> None:
    if not inputs:
        raise ValueError("inputs must hold at least one tensor; found none")
    for i, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            raise TypeError(f"inputs[{i}] must be a torch.Tensor; found {type(value).__name__}")
        if not value.requires_grad:
            raise ValueError(f"inputs[{i}] does not require grad")


def _leaves(losses: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that the losses depend on, in the order in which the graph reaches them."""
    found: dict[int, Tensor] = {id(loss): loss for loss in losses if loss.is_leaf}
    queue = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(queue)
    while queue:
        node = queue.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "a reentrant checkpoint hides its parameters from the graph; use checkpoint(..., use_reentrant=False)"
            )
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        fresh = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return list(found.values())
