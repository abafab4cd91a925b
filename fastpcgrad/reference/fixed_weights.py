"""Weights that do not depend on the task gradients: of J ``[T, N]`` only T is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(rows: Tensor) -> Tensor:
    """1/T each: the gradient of the mean loss."""
    return constant([1 / len(rows)] * len(rows))


def total(rows: Tensor) -> Tensor:
    """1 each: the gradient of the summed losses."""
    return constant([1.0] * len(rows))


def constant(weights: Sequence[float]) -> Tensor:
    """The given weights."""
    return torch.tensor(list(weights), dtype=torch.float64)


def random_weights(normals: Tensor) -> Tensor:
    """RLW, arXiv:2111.10603: the softmax of T standard normal numbers, which are given."""
    exponentials = [torch.exp(number) for number in normals.double()]
    return torch.stack(exponentials) / torch.stack(exponentials).sum()
