"""Weights of tasks that sum to 1 and go on from call to call, where tasks may be absent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Shares:
    """Shares of S problems, by the index of the task; equal at first.

    In a call where tasks are absent, those of the others are what they have together, scaled to 1; what becomes of them
    is scaled back, so that the shares of absent tasks stay. A task that is new begins with the mean share.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        """``[S, T]`` float64, of which the mean is 1; None before the first call."""

    def of(self, tasks: Sequence[int], like: Tensor) -> Tensor:
        """Those of some tasks, which sum to 1.

        Args:
            like: G, ``[k, k]`` or ``[S, k, k]`` of k tasks.
        Returns:
            ``[S, k]``, S = 1 for one problem, on the device of ``like``; equal where all are zero.
        Raises:
            ValueError: they are held for another number of problems.
        """
        problems = like.shape[:-2].numel()
        held = like.new_ones(problems, 0) if self.held is None else self.held.to(like.device)
        if len(held) != problems:
            raise ValueError(
                f"gram has {problems} problems, the weights to go on from have {len(held)}; call reset() when they "
                "change"
            )
        new = 1 + max(tasks) - held.shape[1]
        self.held = torch.nn.functional.pad(held, (0, new), value=1.0) if new > 0 else held
        own = self.held[:, list(tasks)]
        total = own.sum(dim=1, keepdim=True)
        return torch.where(total > 0, own, 1.0) / torch.where(total > 0, total, float(len(tasks)))

    def put(self, tasks: Sequence[int], shares: Tensor) -> None:
        """Go on from these, ``[S, k]``; those of a problem that has a NaN are left as they were."""
        assert self.held is not None
        own = self.held[:, list(tasks)]
        after = shares * own.sum(dim=1, keepdim=True)
        held = self.held.clone()
        held[:, list(tasks)] = torch.where(shares.isnan().any(dim=1, keepdim=True), own, after)
        self.held = held

    def state(self) -> Tensor | None:
        """For a state dict: a copy of what is held."""
        return None if self.held is None else self.held.clone()

    def load(self, held: object) -> None:
        """Go on from what ``state`` gave; ValueError for what it cannot be."""
        if held is not None:
            if not isinstance(held, Tensor) or held.dim() != 2 or held.dtype != torch.float64:
                found = f"{held.dtype} {list(held.shape)}" if isinstance(held, Tensor) else repr(held)
                raise ValueError(f"weights must be a float64 tensor [S, T] or None; found {found}")
            if not (held >= 0).all():
                raise ValueError(f"weights must not be negative; found {held.tolist()}")
            held = held.detach().clone()
        self.held = held


def onto_simplex(points: Tensor) -> Tensor:
    """The nearest point of the simplex, of each of ``[S, k]``."""
    count = points.shape[-1]
    points = points - points.amax(dim=-1, keepdim=True)  # a large number that all share would take the digits of the 1
    descending = points.sort(dim=-1, descending=True).values
    # What is above the threshold that lets the rest sum to 1; the largest always is.
    thresholds = (descending.cumsum(dim=-1) - 1) / torch.arange(1, count + 1, device=points.device, dtype=points.dtype)
    above = (descending > thresholds).sum(dim=-1, keepdim=True).clamp(min=1)
    return (points - thresholds.gather(-1, above - 1)).clamp(min=0)
