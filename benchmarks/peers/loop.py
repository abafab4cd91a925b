"""The widely used PyTorch PCGrad, written here from its description: the baseline most people run today.

One ``backward(retain_graph=True)`` a task, each task's gradient flattened next to a mask of the parameters it
touched, a deep copy of all rows, then T² Python-driven dot products and projections in an order that
``random.shuffle`` makes before every row. Merged: mean over tasks where every task has a gradient, sum
elsewhere.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.models import Forward, Problem


def project_rows(rows: Sequence[Tensor]) -> list[Tensor]:
    """Each row projected away from every row (itself included) that it conflicts with at its turn."""
    projected = copy.deepcopy(list(rows))
    others = list(rows)
    for row in projected:
        random.shuffle(others)
        for other in others:
            inner = torch.dot(row, other)
            if inner < 0:
                row -= inner * other / other.norm() ** 2
    return projected


def loop_pcgrad(rows: list[Tensor]) -> Tensor:
    """The kernel-level baseline: rows in, their projected mean out; no masks, as all entries are shared."""
    return torch.stack(project_rows(rows)).mean(dim=0)


class LoopPCGrad:
    """Wraps an optimizer, as the widely used PCGrad does."""

    def __init__(self, optimizer: Optimizer, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.optimizer = optimizer
        self.reduction = reduction

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.optimizer.step()

    def pc_backward(self, objectives: Iterable[Tensor]) -> None:
        rows: list[Tensor] = []
        masks: list[Tensor] = []
        for objective in objectives:
            self.zero_grad()
            objective.backward(retain_graph=True)
            row, mask = self._flatten()
            rows.append(row)
            masks.append(mask)
        self._unflatten(self._merge(rows, masks))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _flatten(self) -> tuple[Tensor, Tensor]:
        gradients, touched = [], []
        for parameter in self._parameters():
            if parameter.grad is None:
                gradients.append(torch.zeros_like(parameter).flatten())
                touched.append(torch.zeros_like(parameter).flatten())
            else:
                gradients.append(parameter.grad.clone().flatten())
                touched.append(torch.ones_like(parameter).flatten())
        return torch.cat(gradients), torch.cat(touched)

    def _merge(self, rows: list[Tensor], masks: list[Tensor]) -> Tensor:
        shared = torch.stack(masks).prod(dim=0).bool()
        projected = project_rows(rows)
        merged = torch.zeros_like(rows[0])
        common = torch.stack([row[shared] for row in projected])
        merged[shared] = common.mean(dim=0) if self.reduction == "mean" else common.sum(dim=0)
        merged[~shared] = torch.stack([row[~shared] for row in projected]).sum(dim=0)
        return merged

    def _unflatten(self, merged: Tensor) -> None:
        start = 0
        for parameter in self._parameters():
            end = start + parameter.numel()
            parameter.grad = merged[start:end].view(parameter.shape).clone()
            start = end


def kernel(rows: Tensor) -> Callable[[], Tensor]:
    vectors = list(rows.unbind())
    return lambda: loop_pcgrad(vectors)


def step(problem: Problem, optimizer: Optimizer) -> Callable[[Forward], None]:
    wrapped = LoopPCGrad(optimizer)
    return lambda forward: wrapped.pc_backward(forward.losses)
