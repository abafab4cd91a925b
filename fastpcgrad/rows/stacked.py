"""One pass for all tasks through the part of the graph that they share, with their gradients stacked.

Where T tasks meet at one activation, each has its own way to it, and from there on they have the same. There each node
is run once, with the T gradients that come in side by side: a weight is read once instead of T times. The nodes are
called one by one, not by the engine, so no hook is run: there must be none, which is known of a graph that is younger
than the last hook that anybody has registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from .._graph import run_grad
from .._torch import DispatchMode
from .choice import stacking_pays
from .factored import Multiplied
from .factors import Factors, Row
from .hooks import are_without_hooks, has_hooks, register

_BATCHED = {
    *(
        f"{name}Backward0"
        for name in (
            *("Add", "Addmm", "Bmm", "Cat", "Clone", "Div", "Elu", "Exp", "Expand", "Gelu", "Hardtanh", "LeakyRelu"),
            *("Log", "LogSoftmax", "Mean", "Mm", "Mul", "NativeBatchNorm", "NativeLayerNorm", "Neg", "Permute", "Pow"),
            *("Relu", "Select", "Sigmoid", "Silu", "Slice", "Softmax", "Softplus", "Split", "Squeeze", "Stack", "Sub"),
            *("Sum", "T", "Tanh", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
        )
    ),
    *("MeanBackward1", "SqueezeBackward1", "SumBackward1", "TransposeBackward1"),
}
"""Nodes whose formulas are known to give for stacked gradients what they give for each."""

_LEAF = "torch::autograd::AccumulateGrad"
_raw: dict[str, list[str]] = {}


class Trunk:
    """What all tasks have in common.

    Attributes:
        edge: where they meet.
        nodes: from there on, each before those to which it leads.
        leaves: parameters among them that are no factors, by the node that adds to their ``.grad``.
    """

    def __init__(self, factors: Factors, edge: GradientEdge, nodes: list[Node]) -> None:
        self.edge, self.nodes = edge, nodes
        self.inside = set(nodes)
        self._factors = factors
        self.leaves = {
            node: factors.index_of(leaf)
            for node in nodes
            if (leaf := factors.graph.leaves.get(node)) is not None and leaf.requires_grad
            if not factors.is_factored(leaf)
        }

    def run(self, seeds: Tensor) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
        """The gradients of several tasks at once.

        Args:
            seeds: what comes in where they meet, ``[T, ...]``.
        Returns:
            δ of the products of factors, ``[T, M, out]``, and the gradients of leaves, ``[T, ...]``, by node.
        """
        deltas: list[Node] = []
        leaves: list[Node] = []

        def one(seed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            found_deltas, found_leaves = self._one(seed)
            deltas[:], leaves[:] = found_deltas, found_leaves
            return list(found_deltas.values()), list(found_leaves.values())

        with torch.no_grad():
            stacked = torch.func.vmap(one)(seeds)
        return dict(zip(deltas, stacked[0], strict=True)), dict(zip(leaves, stacked[1], strict=True))

    def _one(self, seed: Tensor) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
        """Of one task, as if there were no others: ``vmap`` sees to these."""
        children, products = self._factors.graph.children, self._factors.products
        incoming: dict[tuple[Node, int], Tensor] = {(self.edge.node, self.edge.output_nr): seed}
        deltas: dict[Node, Tensor] = {}
        leaves: dict[Node, Tensor] = {}
        for node in self.nodes:
            arrived = [incoming.pop((node, number), None) for number in range(len(node._input_metadata))]
            if all(grad is None for grad in arrived):
                continue
            if node in self.leaves:
                leaves[node] = arrived[0]  # type: ignore[assignment]
                continue
            outgoing: Sequence[Tensor | None]
            if node in products:
                (delta,) = arrived
                assert delta is not None
                deltas[node] = delta.reshape(-1, delta.shape[-1])
                outgoing = _through_use(node, delta, [self._leads(child) for child, _ in children[node]])
            elif self._leads(node):
                found = node(*arrived)  # type: ignore[operator]
                outgoing = found if isinstance(found, tuple) else (found,)
            else:
                continue
            for (child, number), grad in zip(children[node], outgoing, strict=True):
                if child is None or grad is None:
                    continue
                meta = child._input_metadata[number]
                # Broadcasting is undone between nodes, not in them.
                grad = (grad if grad.shape == meta.shape else grad.sum_to_size(meta.shape)).to(meta.dtype)
                there = incoming.get((child, number))
                incoming[child, number] = grad if there is None else there + grad
        return deltas, leaves

    def _leads(self, node: Node | None) -> bool:
        """Whether something is wanted behind a node, or of it."""
        return node in self._wanted

    @cached_property
    def _wanted(self) -> set[Node | None]:
        wanted: set[Node | None] = {*self.leaves, *self._factors.products}
        for node in reversed(self.nodes):
            if any(child in wanted for child, _ in self._factors.graph.children[node]):
                wanted.add(node)
        return wanted


def _through_use(node: Any, delta: Tensor, leads: Sequence[bool]) -> list[Tensor | None]:
    """What a use of a factored weight hands on: to the bias, to what went in, and nothing to the weight."""
    if not any(leads):
        return [None] * len(leads)
    to_input = delta @ node._saved_mat2.t() if leads[-2] else None
    if node.name() == "MmBackward0":
        return [to_input, None]
    beta = node._saved_beta
    return [None if not leads[0] else delta if beta == 1 else delta * beta, to_input, None]


def find_trunk(factors: Factors) -> Trunk | str:
    """Where the tasks meet; or why there has to be a backward pass for each of them."""
    graph = factors.graph
    everyone = (1 << factors.tasks) - 1
    tasks = graph.tasks
    shared = (node for node in reversed(graph.order) if tasks[node] == everyone and graph.order[node] != _LEAF)
    top = next(shared, None)
    if top is None:
        return "the tasks meet nowhere"
    inside, nodes = {top}, []
    for node in reversed(graph.order):
        if node in inside:
            nodes.append(node)
            inside.update(child for child, _ in graph.children[node] if child is not None)
    ways: set[tuple[Node | None, int]] = {(node, 0) for node in graph.roots if node in inside}
    for node in graph.order:
        if node not in inside:
            ways.update(edge for edge in graph.children[node] if edge[0] in inside)
    if len(ways) != 1:
        return "the tasks meet in several places"
    ((_, number),) = ways
    return _why_not(factors, nodes, inside) or Trunk(factors, GradientEdge(top, number), nodes)


def _why_not(factors: Factors, nodes: Sequence[Node], inside: set[Node]) -> str | None:
    graph = factors.graph
    strange = sorted({graph.order[node] for node in nodes if node not in factors.products} - _BATCHED - {_LEAF})
    if strange:
        return f"not known for stacked gradients: {', '.join(strange)}"
    if any(meta.dtype.is_complex for node in nodes for meta in node._input_metadata):
        return "complex numbers"
    beside = 0
    if any(isinstance(node, BackwardCFunction) for node in graph.order):
        return "a node that Python runs, and that may run another backward pass"
    for node, leaf in graph.leaves.items():
        if leaf._post_accumulate_grad_hooks or leaf._backward_hooks:
            return "a hook on a leaf"
        if node in inside and not factors.is_factored(leaf):
            beside += leaf.numel()
            if not factors.is_parameter(leaf):
                return "a leaf that is no parameter of the surgery"
    within = [
        weight
        for weight in factors.weights.values()
        if isinstance(weight, Multiplied) and all(node in inside for node, _ in weight.nodes)
    ]
    rows = max((weight.left.shape[0] for weight in within), default=0)
    if not stacking_pays(rows, sum(factors.numel(weight.index) for weight in within), beside):
        return "stacking would not pay"
    if any(_is_packed(node, graph.order[node]) for node in nodes):
        return "activations are recomputed, or packed by a hook on saved tensors"
    return None


def _is_packed(node: Any, name: str) -> bool:
    names = _raw.get(name)
    if names is None:
        names = _raw[name] = [own for own in dir(node) if own.startswith("_raw_saved_")]
    for own in names:
        saved = getattr(node, own)
        if any(one.unpack_hook is not None for one in (saved if isinstance(saved, tuple | list) else (saved,))):
            return True
    return False


class Trial:
    """Watches the backward passes of a graph without hooks: whether its next may be stacked."""

    @classmethod
    def of(cls, factors: Factors, trunk: Trunk | str) -> Trial | None:
        """One where there is something to be found out."""
        if isinstance(trunk, str) or factors.known.stacked is not None or DispatchMode is None:
            return None
        if not are_without_hooks(trunk.nodes):
            return None
        return cls(factors, trunk)

    def __init__(self, factors: Factors, trunk: Trunk) -> None:
        self._factors, self._trunk = factors, trunk
        self._seeds: list[Tensor] = []
        self._clones = _Clones()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, what comes in where the tasks meet is noted."""

        def note(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[self._trunk.edge.output_nr]
            if grad is not None:
                self._seeds.append(torch.stack((grad,)))

        handle = register(self._trunk.edge.node.register_prehook, note)
        try:
            with self._clones:
                yield
        finally:
            handle.remove()

    def finish(self, rows: Sequence[Sequence[Tensor | None]]) -> None:
        """Compare, before the last pass frees the graph.

        Args:
            rows: of all tasks but the last.
        """
        self._factors.known.stacked = self._gives_the_same(rows)

    def _gives_the_same(self, rows: Sequence[Sequence[Tensor | None]]) -> bool | None:
        factors, trunk = self._factors, self._trunk
        if self._clones.count or len(self._seeds) != len(rows) or any(map(has_hooks, factors.graph.leaves)):
            return False
        try:
            deltas, leaves = trunk.run(torch.cat(self._seeds))
        except RuntimeError:  # of a formula that does not take stacked gradients; nothing was changed by then
            return False
        pairs = [
            (deltas[node][slot], weight.delta[slot, first : first + deltas[node].shape[1]])
            for weight, node, first in factors.uses
            if node in deltas
            for slot in range(len(rows))
        ]
        for node, index in trunk.leaves.items():
            there = [(leaves[node][slot], row[index]) for slot, row in enumerate(rows)]
            pairs += [(own, other) for own, other in there if other is not None]
        return _are_alike(pairs)


def _are_alike(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool | None:
    """Up to rounding, with room for sums in another order; None where something is not finite.

    Some may be nothing else (of a bias before a normalisation): the longest says how much there is.
    """
    unit = max(torch.finfo(each.dtype).eps for pair in pairs for each in pair)
    errors = torch.stack([torch.linalg.vector_norm(own - other) for own, other in pairs])
    lengths = torch.stack([torch.linalg.vector_norm(other) for _, other in pairs])
    if not bool(lengths.isfinite().all()):
        return None
    return bool((errors <= 64 * unit * torch.maximum(lengths, lengths.amax() / 16)).all())


class _Clones(DispatchMode or object):  # type: ignore[misc]
    """Counts clones, as ``retain_grad()`` makes one of what comes in: no other sign of it is to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def may_stack(factors: Factors, trunk: Trunk) -> str | None:
    """Why there still has to be a backward pass for each task; None where there has not."""
    if factors.known.stacked is False:
        return "a hook on a leaf, an activation that retains its gradient, or stacked gradients that were others"
    if not factors.known.stacked or not factors.known.right.issuperset(factors.weights):
        return "the first two steps of the graph, or since somebody has registered a hook"
    if factors.unsure or not are_without_hooks(trunk.nodes):
        return "the graph is older than the last hook that somebody has registered"
    return None


def run_stacked(factors: Factors, trunk: Trunk, losses: Sequence[Tensor], retain_graph: bool) -> list[Row]:
    """All tasks' gradients: each to the trunk by itself, then together.

    Leaves that are no parameters of the surgery accumulate, as in backward passes.

    Returns:
        the row of each task.
    """
    graph = factors.graph
    heads = [
        leaf
        for node, leaf in graph.leaves.items()
        if node not in trunk.inside and leaf.requires_grad and not factors.is_factored(leaf)
    ]
    edges = [None if edge.node in trunk.inside else edge for edge in factors.edges]
    asked: Any = [trunk.edge, *filter(None, edges), *heads]
    rows: list[Row] = []
    seeds: list[Tensor | None] = []
    with factors.noting():
        for slot, loss in enumerate(losses):
            factors.begin(slot)
            keep = retain_graph or slot + 1 < len(losses)
            found = iter(run_grad(loss, asked, keep))
            seeds.append(next(found))
            factors.note_captured([None if edge is None else next(found) for edge in edges])
            rows.append(factors.row_of(zip(heads, found, strict=True)))
    there = {slot: seed for slot, seed in enumerate(seeds) if seed is not None}
    if there:
        deltas, leaves = trunk.run(torch.stack(list(there.values())))
        for weight, node, first in factors.uses:
            if node in deltas:
                for slot, delta in zip(there, deltas[node], strict=True):
                    weight.add(slot, first, delta)
        for node, gradients in leaves.items():
            for slot, grad in zip(there, gradients, strict=True):
                rows[slot][trunk.leaves[node]] = grad
    return rows
