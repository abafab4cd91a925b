"""Whether a graph keeps the samples of a batch apart, as far as its nodes show it.

It does where each node on the way from the losses down makes row s of its result of row s of what goes in alone, and of
parameters, which all samples have. Of the nodes that are known here that can be read off their shapes and dimensions;
where another one is met nothing is said, and the samples are to be tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd.graph import Node

from .products import SAVED, Graph

Shape = tuple[int, ...]


def are_apart(graph: Graph, samples: int) -> bool:
    """Whether every node is known to keep the samples apart, and each has its rows below those of the one before.

    Args:
        graph: of losses ``[samples]``.
    """
    (root,) = graph.roots
    if root is None or samples < 2:
        return False
    reached, queue = {root: _shape(root)}, [root]
    if not _has_rows(reached[root], samples):
        return False
    while queue:
        node = queue.pop()
        name = graph.order[node]
        if node in graph.leaves:
            continue
        keeps = _KNOWN.get(name[:-1])
        children = graph.children[node]
        inner = {child: number for child, number in children if child is not None and not _is_of_leaf(child, graph)}
        if keeps is None or any(inner.values()) or (name in SAVED and children[-1][0] in inner):
            return False
        for child in inner.keys() - reached:
            reached[child] = _shape(child)
            queue.append(child)
            if not _has_rows(reached[child], samples):
                return False
        if not keeps(node, reached[node], [reached[child] for child in inner]):
            return False
    return True


def _shape(node: Any) -> Shape:
    """Of the first result."""
    return tuple(node._input_metadata[0].shape)


def _has_rows(shape: Shape, samples: int) -> bool:
    return bool(shape) and shape[0] > 0 and shape[0] % samples == 0


def _is_of_leaf(node: Node, graph: Graph) -> bool:
    """Whether a leaf lies there that is used as it is, transposed or in another dtype: what all samples have."""
    while graph.order[node] in ("TBackward0", "ToCopyBackward0"):
        ((child, _),) = graph.children[node]
        assert child is not None
        node = child
    return node in graph.leaves


def _elementwise(node: Any, own: Shape, shapes: list[Shape]) -> bool:
    """Broadcast along other dimensions at most."""
    return all(len(shape) == len(own) and shape[0] == own[0] for shape in shapes)


def _loss(node: Any, own: Shape, shapes: list[Shape]) -> bool:
    return node._saved_reduction == 0 and all(shape[0] == own[0] for shape in shapes)


def _along(node: Any, own: Shape, shapes: list[Shape]) -> bool:
    """Over dimensions that are not the first."""
    found = node._saved_dim
    dims = found if isinstance(found, tuple) else (found,)
    # A negative one is shown as one of 64 bits.
    places = [dim - (1 << 64) if dim >= 1 << 63 else dim for dim in dims]
    return bool(dims) and all(shape[0] == own[0] and dim % len(shape) for shape in shapes for dim in places)


def _normalised(node: Any, own: Shape, shapes: list[Shape]) -> bool:
    return len(node._saved_normalized_shape) < len(own)


def _reshaped(node: Any, own: Shape, shapes: list[Shape]) -> bool:
    """In the order of the elements, in which samples lie one below the other before and after."""
    return True


_KNOWN: dict[str, Callable[[Any, Shape, list[Shape]], bool]] = {
    **dict.fromkeys(
        (
            *("AbsBackward", "AddBackward", "ClampBackward", "CloneBackward", "DivBackward", "EluBackward"),
            *("ExpBackward", "GeluBackward", "HardtanhBackward", "LeakyReluBackward", "LogBackward"),
            *("MaskedFillBackward", "MulBackward", "NegBackward", "PowBackward", "ReluBackward", "RsubBackward"),
            *("SigmoidBackward", "SiluBackward", "SoftplusBackward", "SqrtBackward", "SubBackward", "TanhBackward"),
            *("ToCopyBackward", "WhereBackward"),
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (
            *("BinaryCrossEntropyBackward", "BinaryCrossEntropyWithLogitsBackward", "HuberLossBackward"),
            *("MseLossBackward", "NllLossBackward", "SmoothL1LossBackward"),
        ),
        _loss,
    ),
    **dict.fromkeys(
        (
            *("GatherBackward", "LogSoftmaxBackward", "LogsumexpBackward", "MeanBackward", "SelectBackward"),
            *("SliceBackward", "SoftmaxBackward", "SumBackward"),
        ),
        _along,
    ),
    **dict.fromkeys(("UnsafeViewBackward", "UnsqueezeBackward", "ViewBackward"), _reshaped),
    "NativeLayerNormBackward": _normalised,
    **dict.fromkeys(("AddmmBackward", "MmBackward"), _elementwise),  # with what is added, or has rows, and a weight
}
"""By the name of a node, without the number that torch's own alone have, whether it keeps rows apart: of its shape, and
those of what goes in that is no leaf."""
