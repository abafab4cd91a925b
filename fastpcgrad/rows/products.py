"""Finds the weights that matrix products alone use, and the tables that lookups alone use, in the graph of losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter

from .._gradients import gradient_dtype
from .._graph import leaf_of
from .choice import Choice, factors_pay, lookups_pay
from .hooks import Known, are_without_hooks, has_hooks, has_post_hooks

_PLAIN = (Tensor, Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAVED = {
    **{"AddmmBackward0": "mat1", "MmBackward0": "self"},
    **{"EmbeddingBackward0": "indices", "EmbeddingBagBackward0": "indices"},
}
"""What a node that uses a weight has saved of what went in besides."""
_LOOKUPS = {"EmbeddingBackward0", "EmbeddingBagBackward0"}
_OTHERWISE = "no weight that matrix products alone use, and no table that lookups alone use"
SUM, MEAN = 0, 1
"""The modes of bags in which each lookup has its gradient whatever was found."""

How = Literal["as it is", "transposed", "looked up"]
"""A weight is used."""


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
        if len(self.roots) == 1:
            return dict.fromkeys(self.order, 1)
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


class Finder:
    """Finds the weights that can be factored.

    Args:
        graph: of the losses.
        parameters: each once.
        rows: see ``factors.plan``.
        tables: also those that are looked up.
    Attributes:
        found: by the index of a parameter the nodes that use it.
        how: by the index, what these do with it.
        why: why others were not found, by how many.
    """

    def __init__(self, graph: Graph, parameters: Sequence[Tensor], rows: Choice, *, tables: bool = True) -> None:
        self._graph, self._parameters = graph, parameters
        self._names = SAVED.keys() if tables else SAVED.keys() - _LOOKUPS
        self.found: dict[int, list[Node]] = {}
        self.how: dict[int, How] = {}
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
        if others := len(parameters) - len(self.found) - self.why.total():
            self.why[_OTHERWISE] += others

    def _uses(self, accumulators: dict[Node, int]) -> dict[int, list[Node]]:
        """The nodes that use a parameter, of those that nothing else uses."""
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
                elif name in self._names and slot == self._slot_of_weight(node, name) and _is_plain(node):
                    uses.setdefault(index, []).append(node)
                    how: How = "as it is" if direct else "transposed"
                    if name in _LOOKUPS:
                        how = "looked up"
                    if self.how.setdefault(index, how) != how or (name in _LOOKUPS and not direct):
                        strays.add(index)
                else:
                    strays.add(index)
        return {index: nodes for index, nodes in uses.items() if index not in strays}

    def _slot_of_weight(self, node: Node, name: str) -> int:
        """Which of what goes in is the weight: of products the last."""
        return 0 if name in _LOOKUPS else len(self._graph.children[node]) - 1

    def biases(self, known: Known) -> dict[int, list[Node]]:
        """By the index of a parameter the products that it is added to, where that is all that is done with it.

        Args:
            known: of those of which factors were right nobody has hooked the way.
        """
        graph, place = self._graph, {id(p): index for index, p in enumerate(self._parameters)}
        owner = {node: place[id(leaf)] for node, leaf in graph.leaves.items() if id(leaf) in place and leaf.dim() == 1}
        uses: dict[int, list[Node]] = {}
        strays = set[int]()
        ways = {index: [node] for node, index in owner.items()}
        for node, name in graph.order.items():
            for slot, (child, _) in enumerate(graph.children[node]):
                index = None if child is None else owner.get(child)
                if index is None:
                    continue
                if name == "ToCopyBackward0":
                    owner[node] = index
                    ways[index].append(node)
                elif name == "AddmmBackward0" and slot == 0 and _adds(node, self._parameters[index]):
                    uses.setdefault(index, []).append(node)
                else:
                    strays.add(index)
        return {
            index: nodes
            for index, nodes in uses.items()
            if index not in strays and are_without_hooks(ways[index])
            if index in known.right or not _are_hooked(ways[index], nodes)
        }

    def _why_not(self, p: Tensor, nodes: Sequence[Node], rows: Choice, tasks: int) -> str | None:
        """The reason that a weight is not to be factored."""
        if type(p) not in _PLAIN or p.dtype not in _DTYPES or gradient_dtype(p) != p.dtype or not p.is_contiguous():
            return "a subclass of Tensor, another dtype or strides with gaps"
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return "a hook on the weight"
        metadata = [node._input_metadata[0] for node in nodes]
        if any(getattr(node, f"_raw_saved_{SAVED[node.name()]}").unpack_hook is not None for node in nodes):
            return "activations are recomputed, or packed by a hook on saved tensors"
        saved = [getattr(node, f"_saved_{SAVED[node.name()]}") for node in nodes]
        is_table = nodes[0].name() in _LOOKUPS
        count = sum(a.numel() if is_table else meta.shape[0] for a, meta in zip(saved, metadata, strict=True))
        if not p.numel() or not count:
            return "nothing in it"
        outer = metadata[0].shape[-1]
        inner = p.numel() // outer
        pays = lookups_pay(count, inner, tasks) if is_table else factors_pay(count, inner, outer, tasks)
        if rows == "auto" and not pays:
            return "factors would not pay"
        for a, meta in zip(saved, metadata, strict=True):
            same = meta.dtype == metadata[0].dtype and meta.dtype in _DTYPES and a.device == p.device
            same = same and (is_table or a.dtype == meta.dtype)
            if type(a) not in _PLAIN or a.layout != torch.strided or not same:
                return "an activation that is no dense tensor of the weight's device"
        return None

    def look_for_hooks(self, known: Known) -> set[int]:
        """Leave out weights with hooks on their way, and those that were found to be wrong.

        Returns:
            those on whose way there may be a hook that cannot be seen: each of their gradients is to be compared.
        """
        unsure = set()
        for index in list(self.found):
            if index not in known.right and index not in known.wrong and self._is_hooked(index):
                known.wrong[index] = "a hook between the weight and its products"
            if reason := known.wrong.get(index):
                self.refuse([index], reason)
            elif not are_without_hooks(self._ways[index]):
                unsure.add(index)
        return unsure

    def _is_hooked(self, index: int) -> bool:
        return _are_hooked(self._ways[index], self.found[index])

    def refuse(self, indexes: Iterable[int], reason: str) -> None:
        for index in list(indexes):
            del self.found[index]
            self.why[reason] += 1


def _are_hooked(way: Sequence[Node], products: Sequence[Node]) -> bool:
    """Whether there are hooks of nodes between a parameter and its products."""
    return any(map(has_hooks, way)) or any(map(has_post_hooks, products))


def _adds(node: Any, p: Tensor) -> bool:
    """Whether a product adds a parameter to each row, as it is, and no hook on the parameter looks at its gradient."""
    meta = node._input_metadata[0]
    is_plain = type(p) in _PLAIN and gradient_dtype(p) == p.dtype and not p._backward_hooks
    return is_plain and node._saved_beta == 1 and meta.shape[1] == p.numel() and meta.dtype in _DTYPES


def _is_plain(node: Any) -> bool:
    """Whether a product has no factor besides, and lookups give each its gradient as it comes or a part of it."""
    if node.name() in _LOOKUPS and (node._saved_scale_grad_by_freq or node._saved_sparse):
        return False
    if node.name() == "EmbeddingBagBackward0":
        return node._saved_mode in (SUM, MEAN) and node._saved_per_sample_weights is None
    return node.name() != "AddmmBackward0" or node._saved_alpha == 1
