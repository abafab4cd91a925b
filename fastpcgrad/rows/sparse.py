"""Rows of gradients that autograd makes sparse, as those of ``nn.Embedding(sparse=True)``: what some task has touched.

A row keeps such a gradient sparse and coalesced. For J those of all tasks become a block of the places that any of them
has touched, so that neither memory nor time depend on the size of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .._gradients import dense


class Touched(NamedTuple):
    """Which part of a parameter a block holds.

    Attributes:
        indices: as of a coalesced tensor, ``[sparse dimensions, U]``; the block is ``[U, ...]``.
        shape: of the parameter.
    """

    indices: Tensor
    shape: torch.Size

    @property
    def width(self) -> int:
        """The columns of the block."""
        sparse, count = self.indices.shape
        return count * prod(self.shape[sparse:])

    def gradient(self, block: Tensor) -> Tensor:
        """The sparse gradient that has a block's values, in its memory."""
        return torch.sparse_coo_tensor(self.indices, block, self.shape, check_invariants=False, is_coalesced=True)


NOWHERE: Mapping[int, Touched] = MappingProxyType({})
"""Where all gradients are dense."""


def stays_sparse(grad: Tensor) -> bool:
    """Whether a gradient is kept as it is; other layouts become dense."""
    return grad.layout == torch.sparse_coo and grad.sparse_dim() > 0


class Order(NamedTuple):
    """Of values that belong to places, several to one: in which to add them up.

    Attributes:
        places: each once, ascending.
        counts: how many values each has.
        sources: of the values, those of a place after those of the one before.
    """

    places: Tensor
    counts: Tensor
    sources: Tensor

    @classmethod
    def of(cls, places: Tensor, sources: Tensor | None = None) -> Order:
        """That of values by their places.

        Args:
            places: ``[L]``, one for each value.
            sources: ``[L]``, which of the values it is; None: they come in order.
        """
        ascending, order = places.sort(stable=True)
        distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
        return cls(distinct, counts, order if sources is None else sources[order])

    def sums(self, values: Tensor) -> Tensor:
        """Of several lots of values ``[T, L, d]`` the sums at the places, ``[T, U, d]``."""
        lots, count, width = values.shape
        if not len(self.places):
            return values.new_zeros(lots, 0, width)
        lot = torch.arange(lots, device=values.device)[:, None]
        sources = (self.sources + count * lot).flatten()
        begins = (self.counts.cumsum(0) - self.counts + len(self.sources) * lot).flatten()
        # One kernel that gathers and sums up; that of coalesce() takes ten times as long.
        sums = torch.nn.functional.embedding_bag(sources, values.flatten(0, 1), begins, mode="sum")
        return sums.view(lots, -1, width)


class Coalescing:
    """Makes sparse gradients coalesced, in memory of their own and outside of any graph.

    Tasks of one batch have the same indices, which are put in order once.
    """

    def __init__(self) -> None:
        self._orders: dict[tuple[int, ...], tuple[Tensor, Order]] = {}

    def forget(self) -> None:
        """What was put in order so far."""
        self._orders.clear()

    def __call__(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        grad = grad.detach()
        if grad.is_coalesced() or not grad._values().numel():
            return grad.clone().coalesce().to(dtype)
        values, shape = grad._values(), grad.shape
        order = self._ordered(grad._indices(), shape)
        sums = order.sums(values.reshape(1, len(values), -1)).view(-1, *values.shape[1:])
        return Touched(_indices(order.places, shape[: grad.sparse_dim()]), shape).gradient(sums.to(dtype))

    def _ordered(self, indices: Tensor, shape: torch.Size) -> Order:
        key = indices.data_ptr(), *indices.shape, *shape
        numbers = _numbers(indices, shape[: len(indices)])
        known = self._orders.get(key)
        if known is None or not torch.equal(known[0], numbers):
            known = self._orders[key] = numbers.clone(), Order.of(numbers)
        return known[1]


def in_blocks(
    rows: Sequence[Sequence[Tensor | None]], strides: Sequence[tuple[int, ...]]
) -> tuple[list[list[Tensor | None]], dict[int, Touched]]:
    """The rows with a block in place of each parameter's sparse gradients.

    A parameter of which another task's gradient is dense, as of a table that is multiplied with besides, is dense in
    all rows.

    Args:
        rows: what is sparse in them is coalesced.
        strides: of a dense gradient of each parameter.
    """
    blocks, touched = list(map(list, rows)), {}
    for index, column in enumerate(zip(*rows, strict=True)):
        there = [grad for grad in column if grad is not None]
        depths = {0 if grad.layout == torch.strided else grad.sparse_dim() for grad in there}
        if not any(depths):
            continue
        if len(depths) == 1:
            found, touched[index] = _block(there)
        else:
            found = [as_dense(grad, strides[index]) for grad in there]
        for block, grad in zip(compress(blocks, [grad is not None for grad in column]), found, strict=True):
            block[index] = grad
    return blocks, touched


def as_dense(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The gradient with these strides, itself where it has them."""
    if grad.layout == torch.strided:
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(dense(grad))


def _block(grads: Sequence[Tensor]) -> tuple[list[Tensor], Touched]:
    """Each gradient as its row of the block over all places."""
    first, shape = grads[0]._indices(), grads[0].shape
    values = [grad._values().contiguous() for grad in grads]
    if all(torch.equal(grad._indices(), first) for grad in grads[1:]):  # of one batch
        return values, Touched(first, shape)
    sizes = shape[: len(first)]
    numbers = [_numbers(grad._indices(), sizes) for grad in grads]
    union, places = torch.unique(torch.cat(numbers), return_inverse=True)
    rows = []
    for own, place in zip(values, places.split(list(map(len, numbers))), strict=True):
        row = own.new_zeros(len(union), *own.shape[1:])
        row[place] = own
        rows.append(row)
    return rows, Touched(_indices(union, sizes), shape)


def _numbers(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """One number for each place, ascending in the order of coalesced tensors."""
    numbers = indices[0]
    for own, size in zip(indices[1:], sizes[1:], strict=True):
        numbers = numbers * size + own
    return numbers


def _indices(numbers: Tensor, sizes: Sequence[int]) -> Tensor:
    """The other way round."""
    indices = []
    for size in reversed(sizes[1:]):
        indices.append(numbers % size)
        numbers = numbers // size
    return torch.stack([numbers, *reversed(indices)])
