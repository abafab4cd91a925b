"""J in parts: columns of several dtypes, or on several devices, each part in blocks of one kind."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor

from .._blocks import Blocks
from .._ops import to_device
from ..backends import kernels
from ..methods import Elementwise, Method, Solution
from .sparse import NOWHERE, Touched

Tensors = Sequence[Sequence[Tensor | None]]


class Columns:
    """The two passes over J, whatever dtypes and devices its blocks have.

    G is a sum over columns, so that each part brings its own, and each is combined with the same weights. What is T×T
    lies on the device of the first block.

    Args:
        tensors: for each task its row of each block; None: zeros.
        pointers: where those begin.
        widths: the columns of each block.
        dtypes, devices: of each block.
        touched: by its number, of each block that is part of a sparse gradient.
    """

    def __init__(
        self,
        tensors: Tensors,
        pointers: Sequence[Sequence[int]],
        widths: array[int],
        dtypes: Sequence[torch.dtype],
        devices: Sequence[torch.device],
        touched: Mapping[int, Touched] = NOWHERE,
    ) -> None:
        self.tensors, self.pointers, self.widths = tensors, pointers, widths
        self.dtypes, self.devices, self.touched = dtypes, devices, touched

    @cached_property
    def whole(self) -> Blocks | None:
        """All of J, where it is of one kind."""
        if not self.dtypes:
            return Blocks(self.tensors, self.pointers, self.widths, torch.float32, torch.device("cpu"))
        dtype, device = self.dtypes[0], self.devices[0]
        if self.dtypes.count(dtype) < len(self.dtypes) or self.devices.count(device) < len(self.devices):
            return None
        return Blocks(self.tensors, self.pointers, self.widths, dtype, device)

    @property
    def fused(self) -> Blocks | None:
        """All of J, where one kernel may do both passes and what is between them."""
        return self.whole

    @cached_property
    def parts(self) -> list[tuple[Sequence[int], Blocks]]:
        """Which blocks are of one kind, and these; in the order of the first of each kind."""
        kinds = list(zip(self.dtypes, self.devices, strict=True))
        parts: list[tuple[Sequence[int], Blocks]] = []
        for kind in dict.fromkeys(kinds):
            chosen = [own == kind for own in kinds]
            blocks = self.only(chosen).whole
            assert blocks is not None
            parts.append((list(compress(range(len(chosen)), chosen)), blocks))
        return parts

    def only(self, chosen: Sequence[bool]) -> Columns:
        """Without the other blocks."""
        return Columns(
            [list(compress(row, chosen)) for row in self.tensors],
            [list(compress(row, chosen)) for row in self.pointers],
            array("q", compress(self.widths, chosen)),
            list(compress(self.dtypes, chosen)),
            list(compress(self.devices, chosen)),
        )

    def gram(self, problem_of: Sequence[int] | None, problems: int) -> Tensor:
        """G of each problem, ``[problems, T, T]`` float64; see ``BlockFunctions.gram_blocks``."""
        if self.whole is not None:
            return kernels.gram_blocks(self.whole, problem_of, problems)
        each = [kernels.gram_blocks(blocks, _some(problem_of, places), problems) for places, blocks in self.parts]
        return torch.stack([own.to(each[0].device) for own in each]).sum(dim=0)

    def combine(self, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]) -> None:
        """Each block combined with its row of ``weights``; see ``BlockFunctions.combine_blocks``."""
        if self.whole is not None:
            return kernels.combine_blocks(self.whole, weights, weights_of, out)
        for places, blocks in self.parts:
            chosen = _some(weights_of, places)
            kernels.combine_blocks(blocks, to_device(weights, blocks.device), chosen, [out[index] for index in places])

    def gradients(self, blocks: list[Tensor | None]) -> list[Tensor | None]:
        """What was combined as the parameters have it, in the same memory."""
        for index, part in self.touched.items():
            block = blocks[index]
            blocks[index] = None if block is None else part.gradient(block)
        return blocks

    def solve(self, method: Method, gram: Tensor, tasks: Sequence[int]) -> Solution:
        """What a method makes of G; see ``Method.checked_solve``."""
        return method.checked_solve(gram, tasks)

    def drawing(self, method: Elementwise) -> Callable[[int], Elementwise]:
        """For the number of a block the method, as it merges its columns."""
        return lambda index: method


def _some(numbers: Sequence[int] | None, places: Sequence[int]) -> list[int] | None:
    return None if numbers is None else [numbers[index] for index in places]
