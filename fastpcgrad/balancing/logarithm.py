"""Logarithms of losses: each task's gradient relative to its loss, whatever its unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import all_finite
from .scalarization import Scalarization

_EPS = 1e-8
"""Added to the losses, as in LibMTL."""


class Logarithm(Scalarization):
    """Weights 1 / (L_i + 1e-8), whose weighted losses have the gradients of log(L_i + 1e-8).

    The loss half of DB-MTL: ``methods.DBMTL`` on these losses is the whole. The value of a weighted loss is about 1.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
    Attributes:
        weights: those of the last call whose losses were finite; ones before it.
    Raises:
        ValueError: from a call: a loss of -1e-8 or less, which has no logarithm; see ``Balancer`` for when.
    Source: Lin et al. 2023, Dual-Balancing for Multi-Task Learning, arXiv:2308.12029, sec. 3.1.
    Example:
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> fastpcgrad.balancing.Logarithm(2)(losses).sum().backward()
        >>> losses.grad
        tensor([1.0000, 0.2500])
    """

    def __init__(
        self,
        num_tasks: int | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        self._begin_with(torch.ones(self.num_tasks))

    def slopes(self, losses: Tensor) -> Tensor:
        raised = losses + _EPS
        self._refusals.refuse(all_finite(losses) & ~(raised > 0), (losses,), _why_not)
        return torch.where(raised > 0, 1 / raised, torch.nan)


def _why_not(task: int, values: list[float]) -> str:
    return (
        f"losses[{task}] is {values[0]:.6g}: Logarithm takes log(L + 1e-8); give losses that are positive, or take "
        "STCH, which takes losses of any sign"
    )
