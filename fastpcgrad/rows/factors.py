"""Task gradients of weights as factors: g_t = δ_tᵀ a, of which autograd makes δ_t and nobody the product.

A weight whose only uses are matrix products (the nodes of ``addmm`` and ``mm``), or a table whose only uses are
lookups, is left out of the backward passes. What comes into these nodes, δ_t, is noted on the way; what went in with
the weight, a or the places that were looked up, the graph has saved. Everything else is as in any backward pass: hooks
run, leaves accumulate.

A note is taken by a prehook, which sees what the hooks on the activation have made of a gradient. What the graph does
not show are hooks on the weight's own way, that is on its transposed view. There are none where that is newer than the
last hook that anybody has registered; else each task's gradient of the weight is made besides, and compared with its
factors. The first step of each graph compares that of one task in any case, and looks for hooks on the nodes of that
way; it does so again once any hook was registered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .._graph import REENTRANT
from . import hooks
from .choice import LEAST_ELEMENTS, Choice, RowsReport
from .factored import Factored, LookedUp, Multiplied
from .products import Finder, Graph

Row = list[Tensor | None]
"""One task's gradient of each parameter; None where it has none."""


class Factors:
    """What is kept of one round of losses as factors, and how its backward passes are run.

    Args:
        weights: those that are factored.
        parameters: leaves, each once, in the order of the rows.
        graph: of the losses.
        leaves: what else these depend on.
        known: what the first step of this graph has found.
        unsure: weights of which every gradient is to be compared.
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
        known: hooks.Known,
        unsure: set[int],
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
        self.unsure = unsure
        self.stopped: dict[int, str] = {}
        """Weights of which gradients are kept as they are from some task on, and why."""
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
                handles.append(hooks.register(node.register_prehook, self._note(weight, node, first)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, weight: Factored, node: Node, first: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def note(grads: tuple[Tensor | None, ...]) -> None:
            self._noted.add(node)
            if grads[0] is not None and weight.index not in self.stopped:
                weight.add(self._slot, first, grads[0])

        return note

    def begin(self, slot: int) -> list[Tensor | GradientEdge]:
        """What the backward pass of the loss in this place is to run to: everything but the weights."""
        self._slot = slot
        self._noted.clear()
        unknown = self.unsure.union(index for index in self.weights if index not in self.known.right)
        self.unknown = sorted(unknown.difference(self.stopped))
        return [*self.edges, *self._leaves, *(self._parameters[index] for index in self.unknown)]

    def needs(self, index: int) -> bool:
        """Whether the pass that was begun is to make the gradient of a parameter."""
        return index not in self.weights or index in self.stopped or index in self.unknown

    def note_captured(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what ``torch.autograd.grad`` found at the edges, of nodes that it did not have to run.

        At those that it ran it has looked before the hooks on the activation; a prehook looks after them.
        """
        for (weight, node, first), grad in zip(self.uses, gradients, strict=True):
            if grad is not None and node not in self._noted and weight.index not in self.stopped:
                weight.add(self._slot, first, grad)

    def compare(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Look at what the last pass made of the weights in ``unknown``.

        Where factors do not give what autograd does, or that cannot be told, all gradients are kept as they are from
        here on; those of earlier tasks were compared.

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
            if grad is not None and reached and weight.gives(grad, self._slot):
                self.known.right.add(index)
                alike.append(index)
                continue
            reason = "factors give another gradient than autograd does"
            if grad is None or bool(grad.isfinite().all()):
                self.known.wrong[index] = reason
            weight.reached[self._slot] = False
            self.stopped[index] = reason
            self._leaves.append(self._parameters[index])
        return alike

    def leave_out(self, index: int, reason: str) -> None:
        """Keep no factors of a weight after all."""
        del self.weights[index]
        self._why_dense[self.stopped.get(index, reason)] += 1


_MOST_UNSURE_STEPS = 2
"""In a row, in which ``auto`` compares each gradient with its factors: that saves memory, not time."""


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
    if REENTRANT in graph.names:
        return all_dense("a reentrant checkpoint hides what lies behind it", len(parameters))
    finder = Finder(graph, parameters, rows)
    if rows == "auto" and 0 < sum(parameters[index].numel() for index in finder.found) < LEAST_ELEMENTS:
        finder.refuse(finder.found, f"all weights that could be factored have less than {LEAST_ELEMENTS} elements")
    if not finder.found:
        return RowsReport(dense=dict(finder.why))
    signature = hash((graph.signature, *map(id, parameters)))
    known = hooks.known(signature)
    unsure = finder.look_for_hooks(known)
    steps = hooks.unsure_steps(signature, bool(unsure))
    if rows == "auto" and steps > _MOST_UNSURE_STEPS:
        finder.refuse(unsure, "hooks are registered in every step, after the graph was begun")
        unsure = set()
    if not finder.found:
        return RowsReport(dense=dict(finder.why))
    factored: list[Factored] = []
    for index, uses in finder.found.items():
        how = finder.how[index]
        if how == "looked up":
            factored.append(LookedUp(index, uses, len(losses), parameters[index].shape))
        else:
            factored.append(Multiplied(index, uses, len(losses), how == "as it is"))
    chosen = {id(parameters[index]) for index in finder.found}
    others = [*graph.leaves.values(), *(loss for loss in losses if loss.is_leaf)]
    leaves = [leaf for leaf in others if id(leaf) not in chosen and leaf.requires_grad]
    return Factors(factored, parameters, graph, leaves, known, unsure, finder.why)


def all_dense(reason: str, parameters: int) -> RowsReport:
    """Of a surgery that keeps all its task gradients as they are."""
    return RowsReport(dense={reason: parameters})
