"""Task gradients in blocks, for a backend that takes packed rows only: batches of blocks are packed as they are needed.

Every pass packs anew, so that no more than one batch exists beside the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ops
from .._blocks import Blocks
from ..variants import Guards

_BATCH_BYTES = 64 << 20


class _Part(NamedTuple):
    """Columns of a block; a block of more than a batch holds has several."""

    block: int
    first: int
    last: int

    @property
    def width(self) -> int:
        return self.last - self.first

    def of(self, tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return _ops.flat(tensor)[self.first : self.last]


class Stacked:
    """The block functions of a backend, by its functions on packed rows."""

    def __init__(
        self, gram: Callable[..., Tensor], pcgrad_coefficients: Callable[..., Tensor], combine: Callable[..., None]
    ) -> None:
        self._gram, self._pcgrad_coefficients, self._combine = gram, pcgrad_coefficients, combine

    def gram_blocks(self, blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
        tasks = len(blocks.tensors)
        result = torch.zeros((problems, tasks, tasks), dtype=torch.float64, device=blocks.device)
        for problem, present, parts in _batches(blocks, problem_of):
            if problem < 0:
                continue
            found = self._gram(_pack(blocks, present, parts), None)
            if len(present) == tasks:
                result[problem] += found
            else:  # the index goes to the device, which waits for it
                index = torch.tensor(present, device=blocks.device)
                result[problem].index_put_((index[:, None], index[None, :]), found, accumulate=True)
        return result

    def combine_blocks(
        self, blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
    ) -> None:
        for problem, present, parts in _batches(blocks, weights_of):
            packed = _pack(blocks, present, parts)
            chosen = weights[problem] if len(present) == len(blocks.tensors) else weights[problem, list(present)]
            self._combine(packed, chosen, None, packed[0])
            merged = packed[0].split([part.width for part in parts])
            torch._foreach_copy_([part.of(out[part.block]) for part in parts], merged)
            del packed, merged  # before the next batch is packed

    def pcgrad_blocks(
        self,
        blocks: Blocks,
        order: Tensor,
        guards: Guards,
        scale: float,
        out: Sequence[Tensor | None],
    ) -> _ops.Later:
        gram = self.gram_blocks(blocks, None, 1)[0]
        coefficients = self._pcgrad_coefficients(gram, order, guards)
        return combine_projected(self.combine_blocks, blocks, gram, coefficients, scale, out)


def combine_projected(
    combine_blocks: Callable[..., None],
    blocks: Blocks,
    gram: Tensor,
    coefficients: Tensor,
    scale: float,
    out: Sequence[Tensor | None],
) -> _ops.Later:
    """The second half of a surgery: from C to the merged gradient."""
    weights = scale * coefficients.sum(dim=0)
    combine_blocks(blocks, weights[None], None, out)
    return lambda: _ops.Figures(gram, weights, coefficients)


def batch_columns(tasks: int, width: int, dtype: torch.dtype) -> int:
    """Columns of the largest batch of J in blocks of ``width`` columns together; 1 at least."""
    return max(1, min(width, _BATCH_BYTES // (tasks * dtype.itemsize)))


def _batches(blocks: Blocks, problem_of: Sequence[int] | None) -> Iterator[tuple[int, tuple[int, ...], list[_Part]]]:
    """(problem, the tasks that are there, columns) of neighbours that go together; blocks of no task are left out."""
    most = batch_columns(len(blocks.tensors), sum(blocks.widths), blocks.dtype)
    kind: tuple[int, tuple[int, ...]] = (0, ())
    parts: list[_Part] = []
    width = 0
    for b, column in enumerate(zip(*blocks.tensors, strict=True)):
        present = tuple(t for t, row in enumerate(column) if row is not None)
        found = (problem_of[b] if problem_of is not None else 0, present)
        for first in range(0, blocks.widths[b] if present else 0, most):
            part = _Part(b, first, min(first + most, blocks.widths[b]))
            if parts and (found != kind or width + part.width > most):
                yield *kind, parts
                parts, width = [], 0
            kind = found
            parts.append(part)
            width += part.width
    if parts:
        yield *kind, parts


def _pack(blocks: Blocks, present: Sequence[int], parts: Sequence[_Part]) -> Tensor:
    widths = [part.width for part in parts]
    packed = torch.empty((len(present), sum(widths)), dtype=blocks.dtype, device=blocks.device)
    for row, t in zip(packed, present, strict=True):
        torch._foreach_copy_(row.split(widths), [part.of(blocks.tensors[t][part.block]) for part in parts])
    return packed
