"""Uncertainty weighting: learned homoscedastic uncertainties weigh the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .learned_exponents import LearnedExponents


class UncertaintyWeighting(LearnedExponents):
    """L_i becomes ½ e^(−s_i) L_i + ½ s_i with a learned s_i = log σ_i², which starts at 0.

    The s_i are learned with the network, by any optimizer: the weighted losses carry their gradient. Give them an
    optimizer (or, with surgery, at least a place outside ``shared``) of their own: every task's loss touches the one
    vector s, and surgery that spans it would let other tasks' gradients scale or mix into what belongs to one task.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
    Attributes:
        log_variance: s, a parameter ``[T]``.
        weights: ½ e^(−s), detached.
    Numerics: losses may have any sign, but where L_i stays below 0, ½ e^(−s_i) L_i + ½ s_i has no minimum and s_i falls
        without end: take STCH there. A loss that is not finite gives a weighted loss that is not, while s_i gets a
        gradient of exactly 0 from it: an optimizer with momentum still moves s_i, as it moves any parameter.
    Source: Kendall, Gal, Cipolla 2018, arXiv:1705.07115, with s_i for log σ_i².
    Example:
        >>> balancer = fastpcgrad.balancing.UncertaintyWeighting(2)
        >>> optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
        >>> sum(balancer([torch.tensor(3.0), torch.tensor(1.0)])).backward()
        >>> optimizer.step()  # s_i moves by −0.1 · ½ (1 − L_i)
        >>> balancer.log_variance.data
        tensor([0.1000, 0.0000])
    """

    factor = 0.5

    def __init__(
        self,
        num_tasks: int | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        self.log_variance = nn.Parameter(torch.zeros(self.num_tasks))

    @property
    def exponents(self) -> Tensor:
        return -self.log_variance
