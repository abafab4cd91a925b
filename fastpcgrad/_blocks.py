"""J as autograd leaves it: rows in blocks of columns, one a parameter."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._modes import is_fake


class Blocks(NamedTuple):
    """J, T rows in blocks of columns, one a parameter, each row of a block in memory of its own.

    Attributes:
        tensors: for each task its row of each block, dense, in any order of dimensions, the same in all tasks; None:
            all zero.
        pointers: where those begin; 0 for None.
        widths: the columns of each block.
    """

    tensors: Sequence[Sequence[Tensor | None]]
    pointers: Sequence[Sequence[int]]
    widths: array[int]
    dtype: torch.dtype
    device: torch.device


def first_of(blocks: Blocks) -> Tensor | None:
    """One of the rows, if there is any."""
    for row in blocks.tensors:
        for tensor in row:
            if tensor is not None:
                return tensor
    return None


def addresses(row: Sequence[Tensor | None]) -> list[int]:
    """Where each begins, 0 for None; where no memory is behind them, a number that is another for other memory."""
    if row and type(row[0]) is not Tensor and any(tensor is not None and is_fake(tensor) for tensor in row):
        return [0 if x is None else (x.untyped_storage()._cdata << 48) + x.storage_offset() for x in row]
    return [0 if tensor is None else tensor.data_ptr() for tensor in row]
