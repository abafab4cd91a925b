"""Uncertainty weighting: learned homoscedastic uncertainties weigh the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Balancer


class UncertaintyWeighting(Balancer):
    """L_i becomes ½ e^(−s_i) L_i + ½ s_i with a learned s_i = log σ_i², which starts at 0.

    The s_i are learned with the network, by any optimizer: the weighted losses carry their gradient. Give them an
    optimizer (or, with surgery, at least a place outside ``shared``) of their own: every task's loss touches the one
    vector s, and surgery that spans it would let other tasks' gradients scale or mix into what belongs to one task.

    Args:
        num_tasks: T.
    Attributes:
        log_variance: s, a parameter ``[T]``.
        weights: ½ e^(−s), detached.
    Numerics: a NaN loss gives a NaN weighted loss and, through its gradient, a NaN s_i; the other s are untouched.
    Source: Kendall, Gal, Cipolla 2018, arXiv:1705.07115, with s_i for log σ_i².
    Example:
        >>> balancer = fastpcgrad.balancing.UncertaintyWeighting(2)
        >>> optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
        >>> sum(balancer([torch.tensor(3.0), torch.tensor(1.0)])).backward()
        >>> optimizer.step()  # s_i moves by −0.1 · ½ (1 − L_i)
        >>> balancer.log_variance.data
        tensor([0.1000, 0.0000])
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.log_variance = nn.Parameter(torch.zeros(num_tasks))

    @property
    def weights(self) -> Tensor:  # type: ignore[override]
        return self.log_variance.detach().neg().exp() / 2

    def weigh(self, losses: Tensor) -> Tensor:
        return self.log_variance.neg().exp() / 2

    def forward(self, losses: Sequence[Tensor] | Tensor) -> list[Tensor] | Tensor:
        """The weighted losses ½ e^(−s_i) L_i + ½ s_i; see ``Balancer.forward``."""
        weighted = super().forward(losses)
        penalty = self.log_variance / 2
        if isinstance(weighted, Tensor):
            return weighted + penalty
        return [loss + cost for loss, cost in zip(weighted, penalty.unbind(), strict=True)]
