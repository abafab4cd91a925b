"""Task gradients in blocks, for a backend that takes packed rows only: batches of blocks are packed as they are needed.

Every pass packs anew, so that no more than one batch exists beside the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import _ops

_BATCH_BYTES = 64 << 20


class Stacked:
    """The block functions of a backend, by its functions on packed rows."""

    def __init__(
        self, gram: Callable[..., Tensor], pcgrad_coefficients: Callable[..., Tensor], combine: Callable[..., None]
    ) -> None:
        self._gram, self._pcgrad_coefficients, self._combine = gram, pcgrad_coefficients, combine

    def gram_blocks(self, blocks: _ops.Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
        tasks = len(blocks.tensors)
        result = torch.zeros((problems, tasks, tasks), dtype=torch.float64, device=blocks.device)
        for problem, present, members in _batches(blocks, problem_of):
            if problem < 0:
                continue
            found = self._gram(_pack(blocks, present, members), None)
            if len(present) == tasks:
                result[problem] += found
            else:  # the index goes to the device, which waits for it
                index = torch.tensor(present, device=blocks.device)
                result[problem].index_put_((index[:, None], index[None, :]), found, accumulate=True)
        return result

    def combine_blocks(
        self, blocks: _ops.Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
    ) -> None:
        for problem, present, members in _batches(blocks, weights_of):
            packed = _pack(blocks, present, members)
            chosen = weights[problem] if len(present) == len(blocks.tensors) else weights[problem, list(present)]
            self._combine(packed, chosen, None, packed[0])
            pieces = packed[0].split([blocks.widths[b] for b in members])
            torch._foreach_copy_([_ops.flat(_there(out[b])) for b in members], pieces)

    def pcgrad_blocks(
        self,
        blocks: _ops.Blocks,
        order: Tensor,
        self_projection: bool,
        eps: float,
        min_squared_norm: float,
        scale: float,
        out: Sequence[Tensor | None],
    ) -> _ops.Later:
        gram = self.gram_blocks(blocks, None, 1)[0]
        coefficients = self._pcgrad_coefficients(gram, order, self_projection, eps, min_squared_norm)
        weights = scale * coefficients.sum(dim=0)
        self.combine_blocks(blocks, weights[None], None, out)
        return lambda: _ops.Figures(gram, weights, coefficients)


def _batches(blocks: _ops.Blocks, problem_of: Sequence[int] | None) -> Iterator[tuple[int, tuple[int, ...], list[int]]]:
    """(problem, the tasks that are there, blocks) of neighbours that go together; blocks of no task are left out."""
    columns = _BATCH_BYTES // (len(blocks.tensors) * blocks.dtype.itemsize)
    kind: tuple[int, tuple[int, ...]] = (0, ())
    members: list[int] = []
    for b, column in enumerate(zip(*blocks.tensors, strict=True)):
        present = tuple(t for t, row in enumerate(column) if row is not None)
        found = (problem_of[b] if problem_of is not None else 0, present)
        full = sum(blocks.widths[m] for m in members) + blocks.widths[b] > columns
        if members and (found != kind or full):
            yield *kind, members
            members = []
        if present:
            kind = found
            members.append(b)
    if members:
        yield *kind, members


def _pack(blocks: _ops.Blocks, present: Sequence[int], members: Sequence[int]) -> Tensor:
    widths = [blocks.widths[b] for b in members]
    packed = torch.empty((len(present), sum(widths)), dtype=blocks.dtype, device=blocks.device)
    for row, t in zip(packed, present, strict=True):
        torch._foreach_copy_(row.split(widths), [_ops.flat(_there(blocks.tensors[t][b])) for b in members])
    return packed


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
