"""The graph of several losses: its nodes, how it is run backward, and what a compiled model does to one that is shared.

A backward pass that torch.compile made for a single use writes over what the forward pass saved for it (its donated
buffers). Torch refuses to keep such a graph for a further pass, but two ways lead around its check, both to wrong
gradients without a word (torch 2.13): switching donated_buffer off after the model was compiled, and a backward pass
that comes from inductor's cache on disk, whose key does not say whether it was made for a single use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import has_torch_function, has_torch_function_unary

from ._torch import engine_backward, may_write_kept_graphs, transforms_active

_REMEDY = (
    "give each task a forward of its own and run its backward inside 'with surgery.task(t)'; or set "
    "torch._functorch.config.donated_buffer = False and torch._inductor.config.fx_graph_cache = False before the model "
    "is compiled (one alone is not enough: what an earlier run compiled is in that cache)"
)

REENTRANT = "CheckpointFunctionBackward"
"""The name of a checkpoint's node that runs a graph of its own."""


def nodes(losses: Sequence[Tensor]) -> Iterator[Any]:
    """Each node of the losses' graphs once, in an order that depends on the graphs alone."""
    yield from nodes_behind(loss.grad_fn for loss in losses if loss.grad_fn is not None)


def nodes_behind(roots: Iterable[Any]) -> Iterator[Any]:
    """The same of nodes, these themselves included."""
    queue = list(roots)
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                queue.append(parent)


def leaves(outputs: Sequence[Tensor], *, hidden: bool = False) -> Iterator[Tensor]:
    """The leaves that the outputs depend on, each at least once, in an order that depends on the graphs alone.

    Raises:
        RuntimeError: a reentrant checkpoint hides some, unless ``hidden`` says that the others will do.
    """
    yield from (output for output in outputs if output.is_leaf)
    for node in nodes(outputs):
        if not hidden:
            refuse_reentrant(node.name())
        leaf = leaf_of(node)
        if leaf is not None:
            yield leaf


def unreached(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[int]:
    """Which of the losses depend on none of the inputs, by index.

    A loss is followed to the first input that it depends on, or to where an earlier one has been followed from: losses
    that share a graph do not cost a walk each.
    """
    accumulators = {id(value) for value in inputs if value.is_leaf}
    leading = {(value.grad_fn, value.output_nr) for value in inputs if not value.is_leaf}
    return [t for t, loss in enumerate(losses) if not _leads(loss, accumulators, leading)]


def _leads(loss: Tensor, accumulators: set[int], leading: set[Any]) -> bool:
    """Whether an edge of ``leading`` or a leaf is found from a loss; the edges on the way there join ``leading``."""
    if loss.grad_fn is None:
        return id(loss) in accumulators
    start: Any = (loss.grad_fn, loss.output_nr)
    came_from = {start: start}
    queue = [start]
    while queue:
        edge = queue.pop()
        if edge in leading or id(leaf_of(edge[0])) in accumulators:
            while edge != start:
                leading.add(edge)
                edge = came_from[edge]
            leading.add(start)
            return True
        for parent in edge[0].next_functions:
            if parent[0] is not None and parent not in came_from:
                came_from[parent] = edge
                queue.append(parent)
    return False


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose ``.grad`` a node adds to; None for any other node."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def refuse_reentrant(name: str) -> None:
    """RuntimeError at a checkpoint, by the name of its node: behind it the graph does not show what it depends on.

    Autograd itself would give None for what lies there, without a word.
    """
    if name == REENTRANT:
        raise RuntimeError(
            "a reentrant checkpoint hides its parameters from the graph; use checkpoint(..., use_reentrant=False)"
        )


def run_backward(
    loss: Tensor, retain_graph: bool, inputs: Sequence[Tensor | GradientEdge] = (), one: Tensor | None = None
) -> None:
    """``loss.backward(one, retain_graph, inputs)`` of a scalar that requires grad.

    Calls the engine as torch does. What torch looks at before it takes 25 µs, as long as half of a small model's
    backward pass, and is known here.

    Args:
        one: the gradient of the loss; None: a new one.
    """
    if engine_backward is None or has_torch_function_unary(loss) or transforms_active():
        loss.backward(one, retain_graph=retain_graph, inputs=inputs or None)
        return
    begun = torch.ones_like(loss) if one is None else one
    # Not to create a graph of the derivative; inputs need not be reached; and what is found accumulates.
    engine_backward((loss,), (begun,), retain_graph, False, tuple(inputs), True, True)


def run_grad(
    loss: Tensor, inputs: Sequence[Any], retain_graph: bool, begun: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad(loss, inputs, begun, retain_graph, allow_unused=True)``, as ``run_backward`` does it.

    Args:
        inputs: tensors and ``GradientEdge``.
        begun: the gradient of the loss; None, for a scalar: one.
    """
    if engine_backward is None or has_torch_function((loss, *inputs)) or transforms_active():
        return torch.autograd.grad(loss, inputs, begun, retain_graph, allow_unused=True)
    begun = torch.ones_like(loss) if begun is None else begun
    found: Any = engine_backward((loss,), (begun,), retain_graph, False, tuple(inputs), True, False)
    return tuple(found)


def check_kept(losses: Sequence[Tensor]) -> None:
    """RuntimeError where a graph that is kept for further passes may be written over and torch would not say so.

    Costs nothing before inductor has compiled something, and little where torch's own check is on.
    """
    if "torch._inductor.compile_fx" not in sys.modules:
        return
    if may_write_kept_graphs() and any(node.name() == "CompiledFunctionBackward" for node in nodes(losses)):
        raise RuntimeError(
            "the losses share the graph of a compiled model, and donated_buffer = False does not keep inductor's cache "
            "from answering with a backward pass that writes over it: " + _REMEDY
        )


def explain(error: BaseException | None) -> None:
    """RuntimeError with the remedy, from torch's own, where a graph was freed or a compiled one cannot be kept."""
    if isinstance(error, RuntimeError) and "backward through the graph a second time" in str(error):
        raise RuntimeError(
            "a loss's graph was run backward a second time, but the first pass has freed it: give the first call "
            "retain_graph=True, as in pc_backward(losses, retain_graph=True)"
        ) from error
    if isinstance(error, RuntimeError) and "donated buffer" in str(error):
        raise RuntimeError(
            "this compiled model's backward pass writes over its graph, which further passes need: " + _REMEDY
        ) from error
