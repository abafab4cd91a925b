"""Weights of tasks that sum to 1 and go on from call to call, where tasks may be absent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._task_numbers import TaskNumbers


class Shares(TaskNumbers):
    """Shares of the tasks of each problem, of mean 1 as they are kept; equal at first.

    In a call where tasks are absent, those of the others are what they have together, scaled to 1; what becomes of them
    is scaled back, so that the shares of absent tasks stay. A task that is new begins with the mean share.
    """

    missing = 1.0

    def of(self, gram: Tensor, tasks: Sequence[int]) -> Tensor:
        """See ``TaskNumbers``; they sum to 1, and are equal where all are zero."""
        own = super().of(gram, tasks)
        total = own.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, own, 1.0) / torch.where(total > 0, total, float(len(tasks)))

    def put(self, shares: Tensor, tasks: Sequence[int]) -> None:
        """Go on from these; those of a problem that has a NaN are left as they were."""
        own = self.like(shares, tasks)
        after = shares * own.sum(dim=-1, keepdim=True)
        self.keep(torch.where(shares.isnan().any(dim=-1, keepdim=True), own, after), tasks)

    def load(self, name: str, state: object) -> None:
        """See ``TaskNumbers``; ValueError also for what is negative or NaN."""
        super().load(name, state)
        if self.values is not None and not (self.values >= 0).all():
            raise ValueError(f"{name} must not be negative; found {self.values.tolist()}")


def onto_simplex(points: Tensor) -> Tensor:
    """The nearest point of the simplex, of each of ``[..., k]``."""
    count = points.shape[-1]
    points = points - points.amax(dim=-1, keepdim=True)  # a large number that all share would take the digits of the 1
    descending = points.sort(dim=-1, descending=True).values
    # What is above the threshold that lets the rest sum to 1; the largest always is.
    thresholds = (descending.cumsum(dim=-1) - 1) / torch.arange(1, count + 1, device=points.device, dtype=points.dtype)
    above = (descending > thresholds).sum(dim=-1, keepdim=True).clamp(min=1)
    return (points - thresholds.gather(-1, above - 1)).clamp(min=0)
