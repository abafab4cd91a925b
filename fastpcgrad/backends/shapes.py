"""What is no op, for tensors without memory behind them: results of the right shapes and dtypes, which hold nothing.

The ops themselves have fakes (``_ops``). Nothing is computed, nothing waits, and no pointer goes anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from .._blocks import Blocks, first_of
from ..variants import Guards
from . import abi, eager


def gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    tasks = len(blocks.tensors)
    return _new(blocks, (problems, tasks, tasks))


def combine_blocks(
    blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
) -> None:
    pass


def pcgrad_blocks(
    blocks: Blocks,
    order: Tensor,
    guards: Guards,
    scale: float,
    out: Sequence[Tensor | None],
) -> _ops.Later:
    tasks = len(blocks.tensors)
    found = _ops.Figures(*(_new(blocks, shape) for shape in ((tasks, tasks), (tasks,), (tasks, tasks))))
    return lambda: found


def method_weights(name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None) -> Tensor:
    return abi.new_answers(name, gram)


def gradvac(gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor) -> Tensor:
    return torch.empty_like(gram)


def _new(blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    like = first_of(blocks)
    if like is None:
        return torch.empty(shape, dtype=torch.float64, device=blocks.device)
    return like.new_empty(shape, dtype=torch.float64)


sign_sums, trimmed_mean = eager.sign_sums, eager.trimmed_mean
