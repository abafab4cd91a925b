"""pytorch_optimizer: its PCGrad wrapper, and that wrapper's projection alone for the kernel level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pytorch_optimizer import PCGrad
from torch import Tensor
from torch.optim import SGD, Optimizer

from benchmarks.models import Forward, Problem


def kernel(rows: Tensor) -> Callable[[], Tensor]:
    wrapped = PCGrad(SGD([torch.zeros(1, requires_grad=True)], lr=0.1), reduction="mean")
    vectors = list(rows.unbind())
    present = [torch.ones_like(row) for row in vectors]

    def call() -> Tensor:
        # The projection shuffles the list that it is given in place.
        merged: Tensor = wrapped.project_conflicting(list(vectors), present)
        return merged

    return call


def step(problem: Problem, optimizer: Optimizer) -> Callable[[Forward], None]:
    wrapped = PCGrad(optimizer, reduction="mean")
    return lambda forward: wrapped.pc_backward(forward.losses)
