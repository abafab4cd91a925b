"""The graph behind several losses, cut into pieces that can be run backward one after the other."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Open = dict[GradientEdge, Tensor]
"""One task's gradients at the edges where the next pieces take them up; at a parameter's edge, its gradient."""


@dataclass(frozen=True)
class Piece:
    """Nodes that are run backward together.

    Attributes:
        entries: edges into its nodes, from earlier pieces or the losses.
        exits: edges from its nodes to later pieces or parameters.
        alone: the node, where it has to be called by itself because the engine would run on past the exits.
        complete: parameters whose gradient is complete after this piece, by their index.
        held: elements of parameters whose gradients are there once it has run, for each task.
    """

    entries: Sequence[GradientEdge]
    exits: Sequence[GradientEdge]
    alone: Node | None
    complete: Sequence[int]
    held: int

    def run(self, gradients: Open) -> None:
        """Move one task's gradients from the entries to the exits."""
        entries = [edge for edge in self.entries if edge in gradients]
        if not entries:
            return
        incoming = [gradients.pop(edge) for edge in entries]
        if self.alone is not None:
            found = _call(self.alone, dict(zip(entries, incoming, strict=True)))
        else:
            outgoing = torch.autograd.grad(entries, self.exits, incoming, retain_graph=True, allow_unused=True)
            found = zip(self.exits, outgoing, strict=True)
        for edge, grad in found:
            if grad is not None:
                gradients[edge] = gradients[edge] + grad if edge in gradients else grad


class Graph:
    """What lies between losses and parameters, in the order in which the engine runs it.

    Args:
        losses: scalars that require grad.
        parameters: leaves, each once.
    Attributes:
        roots: the edge of each loss.
        leaves: for each parameter the edge of its gradient; None for one that no loss depends on.
        dtypes: of all gradients on the way.
    Raises:
        RuntimeError: a reentrant checkpoint hides what lies behind it.
    """

    def __init__(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.roots = [get_gradient_edge(loss) for loss in losses]
        indices = {id(p): index for index, p in enumerate(parameters)}
        nodes, leaf_of = _walk([root.node for root in self.roots], indices)
        self.leaves: list[GradientEdge | None] = [None] * len(parameters)
        for node, index in leaf_of.items():
            self.leaves[index] = GradientEdge(node, 0)
        self._widths = [p.numel() for p in parameters]
        self._leaf_of = leaf_of
        self._nodes = _on_the_way(nodes, leaf_of)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        known = self._place.keys() | leaf_of.keys()
        self._edges = [
            [
                GradientEdge(child, number)
                for child, number in node.next_functions
                if child is not None and child in known
            ]
            for node in self._nodes
        ]
        self._sizes = [[prod(meta.shape) for meta in node._input_metadata] for node in self._nodes]
        self.dtypes = {meta.dtype for node in known for meta in node._input_metadata}
        self._joins, self._reach = self._reachable()
        self._last_use = {root.node: -1 for root in self.roots}
        self._last_use.update((e.node, place) for place, edges in enumerate(self._edges) for e in edges)

    @property
    def width(self) -> int:
        """Elements of all parameters that some loss depends on."""
        return sum(self._widths[index] for index in self._leaf_of.values())

    def pieces(self, budget: int) -> Iterator[Piece]:
        """Consecutive pieces, each with up to about ``budget`` elements of parameters where the graph allows it."""
        start, begun = 0, set(self.roots)
        unfinished = {index for node, index in self._leaf_of.items() if node in {root.node for root in self.roots}}
        while True:
            stop, alone = self._stop(start, budget) if self._nodes else (0, False)
            inside = range(start, stop)
            exits = {e for place in inside for e in self._edges[place] if self._place.get(e.node, stop) >= stop}
            unfinished |= {self._leaf_of[e.node] for e in exits if e.node in self._leaf_of}
            complete = [index for index in sorted(unfinished) if self._last_use[self._node_of(index)] < stop]
            entries = [e for e in begun if start <= self._place.get(e.node, -1) < stop]
            held = sum(self._widths[index] for index in unfinished)
            ordered = list(exits)
            yield Piece(entries, ordered, self._nodes[start] if alone else None, complete, held)
            unfinished.difference_update(complete)
            begun |= exits
            start = stop
            if start == len(self._nodes):
                return

    def _node_of(self, index: int) -> Node:
        edge = self.leaves[index]
        assert edge is not None
        return edge.node

    def _stop(self, start: int, budget: int) -> tuple[int, bool]:
        """Where the piece that begins at ``start`` ends, and whether it is one node that must be called by itself.

        Of the ends that leave at least half of the parameters which could be in the piece, the one where the fewest
        elements cross; of equal ones the last.
        """
        exits: dict[Node, set[int]] = {}
        held, fitting = 0, list[tuple[int, int, int]]()
        for place in range(start, len(self._nodes)):
            exits.pop(self._nodes[place], None)
            for node, number in self._numbered(place):
                if node in self._leaf_of and node not in exits:
                    held += self._widths[self._leaf_of[node]]
                exits.setdefault(node, set()).add(number)
            over = held > budget
            if over and fitting:
                break
            if over and self._callable(start) and not self._separate(self._exits_of(start)):
                return start + 1, True
            if self._separate(exits):
                if over:
                    return place + 1, False
                crossing = sum(
                    self._sizes[self._place[node]][number]
                    for node, numbers in exits.items()
                    if node not in self._leaf_of
                    for number in numbers
                )
                fitting.append((held, crossing, place + 1))
        most = max(held for held, _, _ in fitting)
        _, stop = min((crossing, -stop) for held, crossing, stop in fitting if 2 * held >= most)
        return -stop, False

    def _numbered(self, place: int) -> Iterator[tuple[Node, int]]:
        return ((e.node, e.output_nr) for e in self._edges[place])

    def _exits_of(self, place: int) -> Iterable[Node]:
        return {e.node for e in self._edges[place]}

    def _callable(self, place: int) -> bool:
        """Nodes of Python's custom functions are not."""
        return callable(self._nodes[place])

    def _reachable(self) -> tuple[dict[Node, int], list[int]]:
        """A bit for each node with several edges into it, and for each node the bits of those that it reaches."""
        into = Counter(e.node for edges in self._edges for e in edges)
        joins = {node: 1 << bit for bit, node in enumerate(node for node, count in into.items() if count > 1)}
        reach = [0] * len(self._nodes)
        for place in reversed(range(len(self._nodes))):
            for e in self._edges[place]:
                below = self._place.get(e.node)
                reach[place] |= joins.get(e.node, 0) | (0 if below is None else reach[below])
        return joins, reach

    def _separate(self, exits: Iterable[Node]) -> bool:
        """Whether no exit can be reached from another: else the engine would run on from that one."""
        bits = 0
        for node in exits:
            bits |= self._joins.get(node, 0)
        return not any(bits & self._reach[self._place[node]] for node in exits if node in self._place)


def _walk(roots: Iterable[Node], indices: dict[int, int]) -> tuple[list[Node], dict[Node, int]]:
    """All nodes that are no leaves, in the engine's order; and each parameter's leaf with its index.

    An edge's end comes after its beginning; of nodes that could be next, the one made last is.
    """
    waiting: Counter[Node] = Counter()
    leaf_of: dict[Node, int] = {}
    queue = list(dict.fromkeys(roots))
    seen = set(queue)
    while queue:
        node = queue.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "a reentrant checkpoint hides its parameters from the graph; use checkpoint(..., use_reentrant=False)"
            )
        if node.name() == "torch::autograd::AccumulateGrad":
            index = indices.get(id(node.variable))  # type: ignore[attr-defined]
            if index is not None:
                leaf_of[node] = index
        for child, _ in node.next_functions:
            if child is not None:
                waiting[child] += 1
                if child not in seen:
                    seen.add(child)
                    queue.append(child)
    ordered: list[Node] = []
    ready = [(-node._sequence_nr(), n, node) for n, node in enumerate(seen) if not waiting[node]]
    heapq.heapify(ready)
    count = len(seen)
    while ready:
        node = heapq.heappop(ready)[-1]
        if node.next_functions:
            ordered.append(node)
        for child, _ in node.next_functions:
            if child is None:
                continue
            waiting[child] -= 1
            if not waiting[child]:
                count += 1
                heapq.heappush(ready, (-child._sequence_nr(), count, child))
    return ordered, leaf_of


def _on_the_way(nodes: Sequence[Node], leaf_of: dict[Node, int]) -> list[Node]:
    """Those from which a parameter can be reached."""
    known: set[Node] = set(leaf_of)
    for node in reversed(nodes):
        if any(child in known for child, _ in node.next_functions):
            known.add(node)
    return [node for node in nodes if node in known]


def _call(node: Node, gradients: Open) -> Iterator[tuple[GradientEdge, Tensor | None]]:
    """What the engine does with one node, without going on from there."""
    incoming = [gradients.get(GradientEdge(node, number)) for number in range(len(node._input_metadata))]
    with torch.no_grad():
        found = node(*incoming)  # type: ignore[operator]
    outgoing = found if isinstance(found, tuple) else (found,)
    for (child, number), grad in zip(node.next_functions, outgoing, strict=True):
        if child is not None and grad is not None:
            meta = child._input_metadata[number]
            # Broadcasting is undone between nodes, not in them.
            yield GradientEdge(child, number), grad.sum_to_size(meta.shape).to(meta.dtype)
