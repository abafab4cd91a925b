"""The graph behind several losses, cut into pieces that can be run backward one after the other."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .._graph import refuse_reentrant

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
            found = _call(self.alone, dict(zip(entries, incoming, strict=True)), self.exits)
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
        leaves: for each parameter that some loss depends on, by its index, the edge of its gradient.
        dtypes: of all gradients on the way.
    Raises:
        RuntimeError: a reentrant checkpoint hides what lies behind it.
    """

    def __init__(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        edges = map(get_gradient_edge, losses)
        self.roots = [GradientEdge(edge.node, edge.output_nr) for edge in edges]
        indices = {id(p): index for index, p in enumerate(parameters)}
        nodes, leaf_of = _walk([root.node for root in self.roots], indices)
        self.leaves = {index: GradientEdge(node, 0) for node, index in leaf_of.items()}
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
        # Of what comes in by an edge; a node may have outputs of the forward pass that have no gradient.
        metadata = {e: e.node._input_metadata[e.output_nr] for edges in self._edges for e in edges}
        self._sizes = {edge: prod(meta.shape) for edge, meta in metadata.items()}
        self.dtypes = {meta.dtype for meta in metadata.values()} | {loss.dtype for loss in losses}
        self._find_joins()
        new = [0] * (len(self._nodes) + 1)
        for node, index in leaf_of.items():
            new[self._before.get(node, [0])[0] + 1] += self._widths[index]
        self._until = list(accumulate(new))
        """Elements of the parameters that are used before each place."""

    @property
    def width(self) -> int:
        """Elements of all parameters that some loss depends on."""
        return sum(self._widths[index] for index in self._leaf_of.values())

    @property
    def largest(self) -> int:
        """Elements of the largest of these parameters."""
        return max((self._widths[index] for index in self._leaf_of.values()), default=0)

    def pieces(self, budget: int) -> Iterator[Piece]:
        """Consecutive pieces, each with up to about ``budget`` elements of parameters where the graph allows it.

        What earlier pieces have left unfinished (tied weights) counts too, but leaves at least a quarter to the piece.
        """
        start, begun = 0, dict.fromkeys(self.roots)
        unfinished = {index for node, index in self._leaf_of.items() if node in {root.node for root in self.roots}}
        while True:
            room = max(budget - sum(self._widths[index] for index in unfinished), budget // 4)
            stop, alone = self._stop(start, room, unfinished) if self._nodes else (0, False)
            inside = range(start, stop)
            leaving = (e for place in inside for e in self._edges[place] if self._place.get(e.node, stop) >= stop)
            exits = list(dict.fromkeys(leaving))
            unfinished |= {self._leaf_of[e.node] for e in exits if e.node in self._leaf_of}
            complete = [index for index in sorted(unfinished) if self._last_use(index) < stop]
            entries = [e for e in begun if start <= self._place.get(e.node, -1) < stop]
            held = sum(self._widths[index] for index in unfinished)
            yield Piece(entries, exits, self._nodes[start] if alone else None, complete, held)
            unfinished.difference_update(complete)
            begun = {e: None for e in (*begun, *exits) if self._place.get(e.node, -1) >= stop}
            start = stop
            if start == len(self._nodes):
                return

    def _last_use(self, index: int) -> int:
        return self._before.get(self.leaves[index].node, [-1])[-1]

    def _stop(self, start: int, budget: int, unfinished: Collection[int]) -> tuple[int, bool]:
        """Where the piece that begins at ``start`` ends, and whether it is one node that must be called by itself.

        Of the ends within the budget that leave at least half of what could be in the piece, the one where the fewest
        elements cross; of equal ones the last. Where there is none, because the first node alone already has exits
        that can be reached from others (a skip connection), that node is called by itself; one that cannot be called,
        of Python's custom functions, makes the piece larger than the budget.
        """
        exits: dict[Node, set[GradientEdge]] = {}
        leaves = set[Node]()
        held, bits, wall = 0, 0, start
        can_call = callable(self._nodes[start])
        fitting: list[tuple[int, int, int]] = []
        for place in range(start, len(self._nodes)):
            exits.pop(self._nodes[place], None)
            for edge in self._edges[place]:
                if edge.node in self._place:
                    exits.setdefault(edge.node, set()).add(edge)
                elif edge.node not in leaves:
                    leaves.add(edge.node)
                    bits |= self._joins.get(edge.node, 0)
                    index = self._leaf_of[edge.node]
                    held += 0 if index in unfinished else self._widths[index]
            if place >= wall:
                wall = self._wall(exits, bits, place)
                if wall == place and held <= budget:
                    crossing = sum(self._sizes[edge] for edges in exits.values() for edge in edges)
                    fitting.append((held, crossing, place + 1))
                elif wall == place and not fitting and (place == start or not can_call):
                    return place + 1, False
            over = max(held, self._until[wall] - self._until[start]) > budget
            if over and (fitting or can_call):
                break
        if not fitting:
            return start + 1, True
        most = max(held for held, _, _ in fitting)
        _, stop = min((crossing, -stop) for held, crossing, stop in fitting if 2 * held >= most)
        return -stop, False

    def _wall(self, exits: Collection[Node], bits: int, place: int) -> int:
        """``place`` where the piece may end after it, else the next place after which it might.

        It may where no exit can be reached from another, for there the engine would run on. ``bits`` are those of the
        parameters among the exits.
        """
        reached = 0
        for node in exits:
            bits |= self._joins.get(node, 0)
            reached |= self._reach[self._place[node]]
        if not bits & reached:
            return place
        # All ways to the deepest exit that is reached must be inside.
        deepest = self._join_of[(bits & reached).bit_length() - 1]
        reached |= bits
        ways = (p for p in reversed(self._before[deepest]) if p > place and self._comes_from(p, exits, reached, place))
        return next(ways, place + 1)

    def _comes_from(self, place: int, exits: Collection[Node], reached: int, executed: int) -> bool:
        """Whether a node can be reached from the exits, or is one; ``reached`` are the joins of which this is so."""
        while place > executed:
            node = self._nodes[place]
            if node in exits:
                return True
            if node in self._joins:
                return bool(self._joins[node] & reached)
            place = self._before[node][0] if node in self._before else -1
        return False

    def _find_joins(self) -> None:
        """Joins have several edges into them. Each has a bit, a deeper one a higher bit; for each node the bits of the
        joins that it reaches.
        """
        self._before: dict[Node, list[int]] = {}
        for place, edges in enumerate(self._edges):
            for edge in edges:
                self._before.setdefault(edge.node, []).append(place)
        self._join_of = sorted(
            (node for node, places in self._before.items() if len(places) > 1),
            key=lambda node: self._place.get(node, -1),
        )
        self._joins = {node: 1 << bit for bit, node in enumerate(self._join_of)}
        self._reach = [0] * len(self._nodes)
        for place in reversed(range(len(self._nodes))):
            for edge in self._edges[place]:
                below = self._place.get(edge.node)
                self._reach[place] |= self._joins.get(edge.node, 0) | (0 if below is None else self._reach[below])


def _walk(roots: Iterable[Node], indices: dict[int, int]) -> tuple[list[Node], dict[Node, int]]:
    """All nodes that are no leaves, in the engine's order; and each parameter's leaf with its index.

    An edge's end comes after its beginning; of nodes that could be next, the one made last is.
    """
    waiting: Counter[Node] = Counter()
    leaf_of: dict[Node, int] = {}
    seen = dict.fromkeys(roots)
    queue = list(seen)
    while queue:
        node = queue.pop()
        refuse_reentrant(node.name())
        if node.name() == "torch::autograd::AccumulateGrad":
            index = indices.get(id(node.variable))  # type: ignore[attr-defined]
            if index is not None:
                leaf_of[node] = index
        for child, _ in node.next_functions:
            if child is not None:
                waiting[child] += 1
                if child not in seen:
                    seen[child] = None
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


def _call(node: Node, gradients: Open, exits: Collection[GradientEdge]) -> Iterator[tuple[GradientEdge, Tensor | None]]:
    """What the engine does with one node, without going on from there."""
    incoming = [gradients.get(GradientEdge(node, number)) for number in range(len(node._input_metadata))]
    with torch.no_grad():
        found = node(*incoming)  # type: ignore[operator]
    outgoing = found if isinstance(found, tuple) else (found,)
    for (child, number), grad in zip(node.next_functions, outgoing, strict=True):
        if child is not None and grad is not None and (edge := GradientEdge(child, number)) in exits:
            meta = child._input_metadata[number]
            # Broadcasting is undone between nodes, not in them.
            yield edge, grad.sum_to_size(meta.shape).to(meta.dtype)
