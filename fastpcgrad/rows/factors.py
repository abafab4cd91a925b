"""Task gradients of weights as factors: g_t = δ_tᵀ a, of which autograd makes δ_t and nobody the product.

A weight whose only uses are matrix products (the nodes of ``addmm`` and ``mm``) is left out of the backward passes.
What comes into these nodes, δ_t, is noted on the way; what went in with the weight, a, the graph has saved. Everything
else is as in any backward pass: hooks run, leaves accumulate.

A note is taken by a prehook, which sees what the hooks on the activation have made of a gradient. What the graph does
not show are hooks on the weight's own way, that is on its transposed view or on the node that adds to its ``.grad``. So
the first step of each graph compares one task's gradient of each weight, made by autograd, with its factors, and looks
for such hooks; it does so again once any hook was registered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter

from .._gradients import gradient_dtype
from .._graph import leaf_of
from .._memory import prefer_huge_pages
from .._torch import hooks_registered, nodes_made
from .choice import LEAST_ELEMENTS, Choice, RowsReport, factors_pay

Row = list[Tensor | None]
"""One task's gradient of each parameter; None where it has none."""

_PLAIN = (Tensor, Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAVED = {"AddmmBackward0": "mat1", "MmBackward0": "self"}
"""What a product node has saved of what went in with the weight."""


class Factored:
    """The task gradients of one weight.

    Attributes:
        index: of the parameter.
        nodes: the products that use it, each with its first row in a and δ.
        left: a, ``[M, in]``, one use below the other.
        delta: δ, ``[T, M, out]``, fp64 for fp64 gradients, else fp32; zero where nothing came.
        reached: for each task whether anything came.
        transposed: whether the weight is ``[in, out]``, and its gradients aᵀ δ_t.
    """

    def __init__(self, index: int, nodes: Sequence[Node], tasks: int, transposed: bool) -> None:
        self.index, self.transposed = index, transposed
        saved: list[Tensor] = [getattr(node, f"_saved_{_SAVED[node.name()]}").detach() for node in nodes]
        self.left = saved[0] if len(saved) == 1 else torch.cat(saved)
        ends = [0]
        for a in saved:
            ends.append(ends[-1] + a.shape[0])
        self.nodes = list(zip(nodes, ends, strict=False))
        meta = nodes[0]._input_metadata[0]
        dtype = torch.float64 if meta.dtype == torch.float64 else torch.float32
        self.delta = torch.zeros(tasks, ends[-1], meta.shape[1], dtype=dtype, device=saved[0].device)
        self.reached = [False] * tasks

    @property
    def whole(self) -> bool:
        """Whether every task has a gradient."""
        return all(self.reached)

    def add(self, slot: int, first: int, grad: Tensor) -> None:
        """Note what came in for a task at the use whose first row is ``first``."""
        self.delta[slot, first : first + grad.shape[0]].add_(grad)
        self.reached[slot] = True

    def product(self, delta: Tensor) -> Tensor:
        """δᵀ a, in the shape of the weight and the dtype of δ, for any ``[M, out]``."""
        left = self.left.to(delta.dtype)
        first, second = (left.T, delta) if self.transposed else (delta.T, left)
        out = prefer_huge_pages(delta.new_empty(first.shape[0], second.shape[1]))
        with exact_dtypes(delta.device):
            return torch.mm(first, second, out=out)


class Factors:
    """What is kept of one round of losses as factors, and how its backward passes are run.

    Args:
        weights: those that are factored.
        parameters: leaves, each once, in the order of the rows.
        graph: of the losses.
        leaves: what else these depend on.
        known: what the first step of this graph has found.
        why_dense: see ``RowsReport.dense``.
    Attributes:
        weights: by index.
        uses: all their uses: the weight, the product and its first row.
        edges: where δ comes in, of each use.
        products: the nodes of these.
        graph: of the losses.
        why_looped: why there is a backward pass a task; None: they are stacked.
    """

    def __init__(
        self,
        weights: Sequence[Factored],
        parameters: Sequence[Tensor],
        graph: Graph,
        leaves: Sequence[Tensor],
        known: Known,
        why_dense: Counter[str],
    ) -> None:
        self.weights = {weight.index: weight for weight in weights}
        self.uses = [(weight, node, first) for weight in weights for node, first in weight.nodes]
        self.edges = [GradientEdge(node, 0) for _, node, _ in self.uses]
        self.products = {node for _, node, _ in self.uses}
        self.graph, self.known, self.tasks = graph, known, len(graph.roots)
        self._parameters, self._leaves = parameters, list(leaves)
        self._place = {id(p): index for index, p in enumerate(parameters)}
        self._why_dense = why_dense
        self.why_looped: str | None = None
        self._slot = 0
        self._noted: set[Node] = set()
        self.unknown: list[int] = []
        """Weights that the pass to come, or the last one, makes a gradient of besides, for ``compare``."""

    @property
    def report(self) -> RowsReport:
        elements = sum(self._parameters[index].numel() for index in self.weights)
        return RowsReport(len(self.weights), elements, self.why_looped is None, dict(self._why_dense), self.why_looped)

    def numel(self, index: int) -> int:
        return self._parameters[index].numel()

    def is_parameter(self, leaf: Tensor) -> bool:
        return id(leaf) in self._place

    def index_of(self, leaf: Tensor) -> int:
        return self._place[id(leaf)]

    def is_factored(self, leaf: Tensor) -> bool:
        return self._place.get(id(leaf)) in self.weights

    def row_of(self, gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Row:
        """Gradients of leaves as a row; those that are no parameters accumulate."""
        row: Row = [None] * len(self._parameters)
        for leaf, grad in gradients:
            if self.is_parameter(leaf):
                row[self.index_of(leaf)] = grad
            elif grad is not None:
                leaf.grad = grad.clone() if leaf.grad is None else leaf.grad + grad
        return row

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, backward passes leave what comes into the products."""
        handles: list[Any] = []
        try:
            for weight, node, first in self.uses:
                handles.append(_seen.register(node.register_prehook, self._note(weight, node, first)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, weight: Factored, node: Node, first: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def note(grads: tuple[Tensor | None, ...]) -> None:
            self._noted.add(node)
            if grads[0] is not None:
                weight.add(self._slot, first, grads[0])

        return note

    def begin(self, slot: int) -> list[Tensor | GradientEdge]:
        """What the backward pass of the loss in this place is to run to: everything but the weights."""
        self._slot = slot
        self._noted.clear()
        self.unknown = [index for index in self.weights if index not in self.known.right]
        return [*self.edges, *self._leaves, *(self._parameters[index] for index in self.unknown)]

    def note_captured(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what ``torch.autograd.grad`` found at the edges, of nodes that it did not have to run.

        At those that it ran it has looked before the hooks on the activation; a prehook looks after them.
        """
        for (weight, node, first), grad in zip(self.uses, gradients, strict=True):
            if grad is not None and node not in self._noted:
                weight.add(self._slot, first, grad)

    def compare(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Look at what the last pass made of the weights in ``unknown``.

        A weight of which factors do not give what autograd does, or where that cannot be told, is kept as it is from
        here on: no task has reached it before.

        Args:
            gradients: of these, in that order.
        Returns:
            the indices of those whose gradient is not needed, for factors give it.
        """
        alike = []
        for index, grad in zip(self.unknown, gradients, strict=True):
            weight = self.weights[index]
            reached = weight.reached[self._slot]
            if grad is None and not reached:
                continue
            if grad is not None and reached and _is_product(grad, weight, self._slot):
                self.known.right.add(index)
                alike.append(index)
                continue
            reason = "factors give another gradient than autograd does"
            if grad is None or bool(grad.isfinite().all()):
                self.known.wrong[index] = reason
            self._leaves.append(self._parameters[index])
            self.leave_out(index, reason)
        return alike

    def leave_out(self, index: int, reason: str) -> None:
        """Keep no factors of a weight after all."""
        del self.weights[index]
        self._why_dense[reason] += 1


def _is_product(grad: Tensor, weight: Factored, slot: int) -> bool:
    """Whether a gradient is δᵀ a up to rounding: that of a product of this depth, and that of its dtype."""
    delta = weight.delta[slot]
    error = _norm(grad - weight.product(delta).to(grad.dtype))
    coarse = max(torch.finfo(dtype).eps for dtype in (grad.dtype, weight.left.dtype))
    depth = 8 * torch.finfo(delta.dtype).eps * _norm(weight.left) * _norm(delta)
    return bool((error <= 2 * coarse * _norm(grad) + depth) & depth.isfinite())


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def exact_dtypes(device: torch.device) -> Any:
    """Autocast would round what goes into a product."""
    return torch.autocast(device.type, enabled=False)


class Known:
    """Of a graph's weights, by index: of which factors were compared and right, and why others are not to be used."""

    def __init__(self) -> None:
        self.right: set[int] = set()
        self.wrong: dict[int, str] = {}
        self.stacked: bool | None = None
        """Whether stacked gradients were compared, and right."""


class _Seen:
    """What is known of graphs that were run before, as long as nobody else registers a hook on anything."""

    _MOST = 256

    def __init__(self) -> None:
        self._hooks = -1
        self._thread, self._count = -1, -1
        self._graphs: dict[int, Known] = {}

    def known(self, signature: int) -> Known:
        """Of a graph, by what it looks like."""
        hooks = hooks_registered()
        if hooks != self._hooks or len(self._graphs) > self._MOST:
            self._graphs.clear()
            self._hooks = hooks
            self._thread, self._count = get_ident(), nodes_made()
        return self._graphs.setdefault(signature, Known())

    def register(self, register: Callable[..., Any], hook: Callable[..., None]) -> Any:
        """A hook of ours, which does not count."""
        self._hooks += 1
        return register(hook)

    def are_newer(self, nodes: Iterable[Node]) -> bool:
        """Whether each of these nodes was made since the hooks were counted, in this thread: then it has none."""
        born = [node._sequence_nr() for node in nodes]
        return self._thread == get_ident() and min(born) >= self._count


_seen = _Seen()
register = _seen.register


def are_without_hooks(nodes: Iterable[Node]) -> bool:
    """Whether nobody can have registered a hook on any of these nodes."""
    return _seen.are_newer(nodes)


def plan(losses: Sequence[Tensor], parameters: Sequence[Tensor], rows: Choice) -> Factors | RowsReport:
    """How to run several losses backward so that weights' gradients are kept as factors.

    Args:
        losses: T scalars that require grad.
        parameters: leaves, each once, in the order of the rows.
        rows: ``auto``: where that pays; ``factored``: where it can be done.
    Returns:
        what runs them; where no weight is to be factored, why.
    Raises:
        RuntimeError: the graph was freed, or an activation changed since.
    """
    graph = Graph(losses)
    if "CheckpointFunctionBackward" in graph.names:
        return all_dense("a reentrant checkpoint hides what lies behind it", len(parameters))
    finder = _Finder(graph, parameters, rows)
    if rows == "auto" and 0 < sum(parameters[index].numel() for index in finder.found) < LEAST_ELEMENTS:
        finder.refuse_all(f"all weights that could be factored have less than {LEAST_ELEMENTS} elements")
    if not finder.found:
        return RowsReport(dense=dict(finder.why))
    signature = hash((graph.signature, *map(id, parameters)))
    known = _seen.known(signature)
    finder.look_for_hooks(known)
    factored = [Factored(index, uses, len(losses), finder.transposed[index]) for index, uses in finder.found.items()]
    chosen = {id(parameters[index]) for index in finder.found}
    others = [*graph.leaves.values(), *(loss for loss in losses if loss.is_leaf)]
    leaves = [leaf for leaf in others if id(leaf) not in chosen and leaf.requires_grad]
    return Factors(factored, parameters, graph, leaves, known, finder.why)


def all_dense(reason: str, parameters: int) -> RowsReport:
    """Of a surgery that keeps all its task gradients as they are."""
    return RowsReport(dense={reason: parameters})


class Graph:
    """What lies behind the losses.

    Attributes:
        roots: of the losses; None of one that is a leaf.
        order: its nodes with their names, each after all to which it leads.
        children: of each node.
        leaves: by the node that adds to their ``.grad``.
        names: of its nodes.
    """

    def __init__(self, losses: Sequence[Tensor]) -> None:
        self.roots = [loss.grad_fn for loss in losses]
        self.children: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        self.order: dict[Node, str] = {}
        for root in self.roots:
            self._follow(root)
        self.leaves = {node: leaf for node in self.order if (leaf := leaf_of(node)) is not None}
        self.names = set(self.order.values())

    def _follow(self, root: Node | None) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            if node is None or node in self.order:
                stack.pop()
            elif node in self.children:
                self.order[node] = node.name()
                stack.pop()
            else:
                self.children[node] = children = node.next_functions
                stack += [child for child, _ in children if child is not None and child not in self.order]

    @property
    def signature(self) -> int:
        """The same for graphs with the same nodes and edges."""
        place = {node: number for number, node in enumerate(self.order)}
        return hash(
            tuple(
                (name, *((place.get(child), number) for child, number in self.children[node]))  # type: ignore[arg-type]
                for node, name in self.order.items()
            )
        )

    @cached_property
    def tasks(self) -> dict[Node, int]:
        """For each node the tasks that reach it, a bit each."""
        masks = dict.fromkeys(self.order, 0)
        for task, root in enumerate(self.roots):
            if root is not None:
                masks[root] |= 1 << task
        for node in reversed(self.order):
            mask = masks[node]
            for child, _ in self.children[node]:
                if child is not None:
                    masks[child] |= mask
        return masks


class _Finder:
    """Finds the weights that can be factored.

    Attributes:
        found: by the index of a parameter the products that use it.
        transposed: by the index, see ``Factored``.
        why: why others were not found, by how many.
    """

    def __init__(self, graph: Graph, parameters: Sequence[Tensor], rows: Choice) -> None:
        self._graph, self._parameters = graph, parameters
        self.found: dict[int, list[Node]] = {}
        self.transposed: dict[int, bool] = {}
        self.why: Counter[str] = Counter()
        self._ways: dict[int, list[Node]] = {}
        place = {id(p): index for index, p in enumerate(parameters)}
        accumulators = {
            node: place[id(leaf)] for node, leaf in graph.leaves.items() if id(leaf) in place and leaf.dim() == 2
        }
        uses = self._uses(accumulators)
        tasks = graph.tasks if uses else {}
        for index, nodes in uses.items():
            reached = tasks[self._ways[index][0]].bit_count()
            reason = self._why_not(parameters[index], nodes, rows, reached)
            if reason is None:
                self.found[index] = nodes
            else:
                self.why[reason] += 1
        self.why["no weight of matrix products alone"] += len(parameters) - len(self.found) - self.why.total()
        self.why = +self.why

    def _uses(self, accumulators: dict[Node, int]) -> dict[int, list[Node]]:
        """The products that use a parameter, of those that nothing else uses."""
        owner = {node: (index, True) for node, index in accumulators.items()}
        uses: dict[int, list[Node]] = {}
        strays = set[int]()
        self._ways = {index: [node] for node, index in accumulators.items()}
        for node, name in self._graph.order.items():
            for slot, (child, _) in enumerate(self._graph.children[node]):
                if child is None or child not in owner:
                    continue
                index, direct = owner[child]
                if name in ("TBackward0", "ToCopyBackward0"):
                    owner[node] = index, direct ^ (name == "TBackward0")
                    self._ways[index].append(node)
                elif name in _SAVED and slot == len(self._graph.children[node]) - 1 and _is_plain(node):
                    uses.setdefault(index, []).append(node)
                    if self.transposed.setdefault(index, direct) is not direct:
                        strays.add(index)
                else:
                    strays.add(index)
        return {index: nodes for index, nodes in uses.items() if index not in strays}

    def _why_not(self, p: Tensor, nodes: Sequence[Node], rows: Choice, tasks: int) -> str | None:
        """The reason that a weight is not to be factored."""
        if type(p) not in _PLAIN or p.dtype not in _DTYPES or gradient_dtype(p) != p.dtype or not p.is_contiguous():
            return "a subclass of Tensor, another dtype or strides with gaps"
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return "a hook on the weight"
        metadata = [node._input_metadata[0] for node in nodes]
        count = sum(meta.shape[0] for meta in metadata)
        if not p.numel() or not count:
            return "nothing in it"
        outer = metadata[0].shape[1]
        if rows == "auto" and not factors_pay(count, p.numel() // outer, outer, tasks):
            return "factors would not pay"
        if any(getattr(node, f"_raw_saved_{_SAVED[node.name()]}").unpack_hook is not None for node in nodes):
            return "activations are recomputed, or packed by a hook on saved tensors"
        for node, meta in zip(nodes, metadata, strict=True):
            a: Tensor = getattr(node, f"_saved_{_SAVED[node.name()]}")
            same = a.dtype == meta.dtype == metadata[0].dtype and meta.dtype in _DTYPES and a.device == p.device
            if type(a) not in _PLAIN or a.layout != torch.strided or not same:
                return "an activation that is no dense tensor of the weight's device"
        return None

    def look_for_hooks(self, known: Known) -> None:
        """Leave out weights with hooks on their way, and those that were found to be wrong."""
        for index in list(self.found):
            if index not in known.right and index not in known.wrong and self._is_hooked(index):
                known.wrong[index] = "a hook between the weight and its products"
            if index in known.wrong:
                del self.found[index]
                self.why[known.wrong[index]] += 1

    def _is_hooked(self, index: int) -> bool:
        return any(map(has_hooks, self._ways[index])) or any(map(_has_post_hooks, self.found[index]))

    def refuse_all(self, reason: str) -> None:
        self.why[reason] += len(self.found)
        self.found = {}


def _is_plain(node: Any) -> bool:
    """Whether a product has no factor besides."""
    return node.name() != "AddmmBackward0" or node._saved_alpha == 1


def has_hooks(node: Node) -> bool:
    """Whether somebody has registered hooks on a node; those on a tensor cannot be found so."""
    return _has_others(node.register_prehook) or _has_post_hooks(node)


def _has_post_hooks(node: Node) -> bool:
    return _has_others(node.register_hook)


def _has_others(register: Callable[..., Any]) -> bool:
    """Whether there are hooks besides one that is registered and removed here."""
    handle = _seen.register(register, lambda *_: None)
    count = len(handle.hooks_dict_ref())
    handle.remove()
    return count > 1
