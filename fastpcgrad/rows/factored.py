"""The task gradients of one parameter as factors: what comes into the nodes that use it, and what these do with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._memory import prefer_huge_pages
from .._ops import to_device
from ..backends import kernels
from .products import MEAN, SAVED
from .sparse import Order


class Factored(ABC):
    """The task gradients of one parameter.

    Args:
        index: of the parameter.
        nodes: those that use it.
        tasks: T.
    Attributes:
        nodes: each with its first row in δ.
        delta: δ, what comes into these, one use below the other, ``[T, M, out]``; fp64 for fp64 gradients, else fp32;
            zero where nothing came.
        reached: for each task whether anything came.
    """

    def __init__(self, index: int, nodes: Sequence[Node], tasks: int) -> None:
        self.index = index
        metadata = [node._input_metadata[0] for node in nodes]
        ends = [0, *accumulate(prod(meta.shape[:-1]) for meta in metadata)]
        self.nodes = list(zip(nodes, ends, strict=False))
        self._dtype: torch.dtype = metadata[0].dtype
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        self.delta = torch.zeros(tasks, ends[-1], metadata[0].shape[-1], dtype=dtype, device=metadata[0].device)
        self.reached = [False] * tasks

    def add(self, slot: int, first: int, grad: Tensor) -> None:
        """Note what came in for a task at the use whose first row is ``first``."""
        grad = grad.reshape(-1, grad.shape[-1])
        self.delta[slot, first : first + grad.shape[0]].add_(grad)
        self.reached[slot] = True

    def gives(self, grad: Tensor, slot: int) -> bool:
        """Whether autograd's gradient of a task is that of the factors, up to the rounding of its sums and dtype."""
        delta = self.delta[slot]
        error = _norm(self.product(delta).sub_(grad))
        coarse = max(torch.finfo(dtype).eps for dtype in (grad.dtype, self._dtype))
        depth = self._rounding(delta)
        return bool((error <= 2 * coarse * _norm(grad) + depth) & depth.isfinite())

    @abstractmethod
    def product(self, delta: Tensor) -> Tensor:
        """The gradient of which this is δ, ``[M, out]``; in its dtype and the shape of the parameter."""

    @abstractmethod
    def merged(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of the tasks' gradients with these weights, in memory of its own.

        Args:
            weights: w, ``[T]`` float64.
            dtype: of the gradient.
        """

    @abstractmethod
    def gram(self) -> tuple[Tensor, bool]:
        """G, ``[T, T]`` float64, and whether it is as exact as a G of rows."""

    @abstractmethod
    def _rounding(self, delta: Tensor) -> Tensor:
        """What sums in the dtype of δ may round off a gradient, as its norm."""


class Multiplied(Factored):
    """Of a weight in matrix products: g_t = δ_tᵀ a.

    With K = a aᵀ the products of these are G_ts = ⟨δ_t, K δ_s⟩, and the merged gradient is (Σ_t w_t δ_t)ᵀ a: one
    product instead of T.

    Attributes:
        left: a, ``[M, in]``.
        transposed: whether the weight is ``[in, out]``, and its gradients aᵀ δ_t.
    """

    def __init__(self, index: int, nodes: Sequence[Node], tasks: int, transposed: bool) -> None:
        super().__init__(index, nodes, tasks)
        self.transposed = transposed
        saved = list(map(self.of_input, nodes))
        self.left = saved[0] if len(saved) == 1 else torch.cat(saved)

    def of_input(self, node: Any) -> Tensor:
        """What a product has saved of what went in, ``[M, in]``."""
        saved: Tensor = getattr(node, f"_saved_{SAVED[node.name()]}")
        return saved.detach()

    def product(self, delta: Tensor, left: Tensor | None = None) -> Tensor:
        """δᵀ a, also of rows in another order, with a in that order."""
        left = (self.left if left is None else left).to(delta.dtype)
        first, second = (left.T, delta) if self.transposed else (delta.T, left)
        out = prefer_huge_pages(delta.new_empty(first.shape[0], second.shape[1]))
        with exact_dtypes(delta.device):
            return torch.mm(first, second, out=out)

    def merged(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        weights = to_device(weights, self.delta.device)
        combined = kernels.combine(self.delta.flatten(1), weights).view(self.delta.shape[1:])
        return self.product(combined).to(dtype)

    def gram(self) -> tuple[Tensor, bool]:
        """In float64, products and all: those of fp32 gradients cannot leave its range, and what cancels in G leaves an
        error of 2⁻⁵³ ‖a‖²‖δ_t‖²."""
        a, delta = self.left.double(), self.delta.double()
        with exact_dtypes(a.device):
            products = (a @ a.T) @ delta
            flat = delta.flatten(1)
            gram = flat @ products.flatten(1).T
        is_zero = (flat.abs().amax(dim=1) == 0) | (a.abs().amax() == 0)
        return symmetric_if_exact(gram, a.square().sum(), flat.square().sum(dim=1), is_zero, self.delta.dtype)

    def _rounding(self, delta: Tensor) -> Tensor:
        return 8 * torch.finfo(delta.dtype).eps * _norm(self.left) * _norm(delta)


class LookedUp(Factored):
    """Of a table of which rows are looked up: g_t has at each place the sum of the δ_t of its lookups, and else zeros.

    So J is as wide as what was looked up, as that of sparse gradients is.

    Args:
        shape: of the table.
    """

    def __init__(self, index: int, nodes: Sequence[Node], tasks: int, shape: torch.Size) -> None:
        super().__init__(index, nodes, tasks)
        self._shape = shape
        found, rows, sizes = [], [], []
        for node, first in self.nodes:
            indices = _indices(node)
            row, size = _in_bags(node, indices) if node.name() == "EmbeddingBagBackward0" else _one_by_one(indices)
            found.append(indices[: len(row)])
            rows.append(row + first)
            sizes.append(size)
        indices, sources = torch.cat(found), torch.cat(rows)
        there = indices >= 0
        self._order = Order.of(indices[there], sources[there])
        self._sizes = None if all(size is None for size in sizes) else self._of_rows(sizes)

    def _of_rows(self, sizes: Sequence[Tensor | None]) -> Tensor:
        """Among how many lookups each row of δ is divided, ``[M, 1]``."""
        all_sizes = self.delta.new_ones(self.delta.shape[1], 1)
        for (_, first), size in zip(self.nodes, sizes, strict=True):
            if size is not None:
                all_sizes[first : first + len(size), 0] = size
        return all_sizes

    def _sums(self, deltas: Tensor) -> Tensor:
        return self._order.sums(deltas if self._sizes is None else deltas / self._sizes)

    @cached_property
    def _block(self) -> Tensor:
        """The gradients at the places that are looked up, ``[T, U, out]``."""
        return self._sums(self.delta)

    def product(self, delta: Tensor) -> Tensor:
        return self._spread(self._sums(delta[None])[0], delta.dtype)

    def merged(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        weights = to_device(weights, self.delta.device)
        out = self._spread(kernels.combine(self._block.flatten(1), weights).view(self._block.shape[1:]), dtype)
        return out if bool(weights.isfinite().all()) else out.fill_(torch.nan)  # as zeros with these weights are

    def gram(self) -> tuple[Tensor, bool]:
        """Of the places that are looked up, whose sums are autograd's."""
        return kernels.gram(self._block.flatten(1)), True

    def _spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """These at their places, and zeros elsewhere."""
        out = prefer_huge_pages(values.new_empty(self._shape, dtype=dtype)).zero_()
        return out.index_copy_(0, self._order.places, values.to(dtype))

    def _rounding(self, delta: Tensor) -> Tensor:
        """That of partial sums is as large as they are, and random in sign."""
        if not len(self._order.places):
            return delta.new_zeros(())
        sums = _norm(self._sums(delta[None].abs()))
        return 4 * torch.finfo(delta.dtype).eps * self._order.counts.amax().sqrt() * sums


def _indices(node: Any) -> Tensor:
    """The places that a node has looked up, one after the other; -1 for that of padding, which has no gradient."""
    found: Tensor = node._saved_indices.flatten().long()
    padding: int = node._saved_padding_idx  # without one it is -1, which some nodes show as one of 64 bits
    return found if padding >= 1 << 63 else found.masked_fill(found == padding, -1)


def _one_by_one(indices: Tensor) -> tuple[Tensor, None]:
    """The row of δ of each lookup."""
    return torch.arange(len(indices), device=indices.device), None


def _in_bags(node: Any, indices: Tensor) -> tuple[Tensor, Tensor | None]:
    """The row of δ of each lookup, its bag's; and of each bag among how many its δ is divided, where it is."""
    bags = node._input_metadata[0].shape[0]
    ends = torch.cat([node._saved_offsets.long(), indices.new_tensor([len(indices)])])[: bags + 1]
    each = torch.arange(bags, device=indices.device)
    rows = each.repeat_interleave(ends.diff())
    if node._saved_mode != MEAN:
        return rows, None
    counted = torch.zeros_like(each).index_add_(0, rows, (indices[: len(rows)] >= 0).long())
    return rows, counted.clamp(min=1)


def _norm(tensor: Tensor) -> Tensor:
    """In float64, piece by piece: torch would make a copy of the whole."""
    pieces = tensor.reshape(-1).split(1 << 17)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).norm()


_LARGEST_ERROR = {torch.float64: 1e-12}
_LARGEST_ERROR_OF_NARROWER = 1e-8
"""Of G, relative to ‖g_t‖²."""
_LEAST_PRODUCT = 1e-250
"""Below, products of activations, of δ, or what is summed in G may be too small for float64."""


def symmetric_if_exact(
    gram: Tensor, left: Tensor, delta: Tensor, is_zero: Tensor, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """G from factors made symmetric, and whether it is as exact as a G of rows.

    Args:
        gram: ``[T, T]`` float64.
        left: ``[T]`` or for all tasks, ‖a‖² in float64.
        delta: ``[T]``, ‖δ_t‖²; the product of both is the largest that what is summed in ‖g_t‖² can come to.
        is_zero: ``[T]``, of which tasks the gradient is known to be zero.
        dtype: of δ.
    """
    gram, bound = (gram + gram.T) / 2, left * delta
    error = torch.finfo(torch.float64).eps * bound
    largest = _LARGEST_ERROR.get(dtype, _LARGEST_ERROR_OF_NARROWER)
    is_in_range = (left >= _LEAST_PRODUCT) & (delta >= _LEAST_PRODUCT) & (bound >= _LEAST_PRODUCT)
    is_exact = is_zero | ((error <= largest * gram.diagonal()) & is_in_range)
    return gram, bool((is_exact & gram.isfinite().all()).all())


def exact_dtypes(device: torch.device) -> Any:
    """Autocast would round what goes into a product."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
