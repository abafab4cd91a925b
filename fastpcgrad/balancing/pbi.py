"""PBI: how far the losses are along the direction that is preferred, and how far beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from .base import task_values
from .scalarization import Scalarization, preferences


class PBI(Scalarization):
    """Weights whose weighted sum of losses has the gradient of d₁ + θ d₂, the penalty-based boundary intersection.

    With f = L − z and the unit vector r̂ of the preferences, d₁ = r̂·f is the distance along it and d₂ = ‖f − d₁ r̂‖ that
    beside it: w = r̂ + θ (f − d₁ r̂) / d₂, and r̂ where d₂ = 0. Weights are negative where a loss is too small for its
    preference and θ is large.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
        theta: θ >= 0; the paper takes 5.
        preference: r, T numbers >= 0, of which one is > 0; None: 1/T each. To be drawn anew for each step as in
            ``COSMOS``.
        ideal: z, T numbers: the best loss that each task could reach; None: zeros.
    Attributes:
        preference, ideal: r and z, buffers; whatever is assigned is looked at as the arguments are.
        weights: those of the last call whose losses were finite; r̂ before it.
    Raises:
        ValueError: ``theta`` or a preference out of range, or not T numbers.
    Numerics: losses may have any sign. d₂ counts as 0 below T eps ‖f‖, where its direction is rounding.
    Source: Zhang and Li 2007, MOEA/D, doi:10.1109/TEVC.2007.892759, sec. II.C. Oracle: ``reference.pbi``.
    Example:
        >>> balancer = fastpcgrad.balancing.PBI(2, theta=5.0, preference=[1.0, 0.0])
        >>> balancer(torch.tensor([2.0, 3.0]))  # d₁ = 2 and d₂ = 3
        tensor([ 2., 15.])
    """

    preference: Tensor
    ideal: Tensor
    given = MappingProxyType({"preference": preferences, "ideal": partial(task_values, "ideal")})

    def __init__(
        self,
        num_tasks: int | None = None,
        theta: float = 5.0,
        preference: Iterable[float] | Tensor | None = None,
        ideal: Iterable[float] | Tensor | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        if not 0 <= theta < float("inf"):
            raise ValueError(f"theta must be a finite number >= 0; found {theta!r}")
        zeros = [0.0] * self.num_tasks
        self.theta = theta
        self.register_buffer("preference", preferences(preference, self.num_tasks))
        self.register_buffer("ideal", task_values("ideal", zeros if ideal is None else ideal, self.num_tasks))
        self._begin_with(self.preference / self.preference.norm())

    def slopes(self, losses: Tensor) -> Tensor:
        along = self.preference / self.preference.norm()
        excess = losses - self.ideal
        scaled = excess / torch.where(excess != 0, excess.abs().max(), 1.0)
        beside = scaled - (along @ scaled) * along
        distance = beside.norm()
        there = distance > self.num_tasks * torch.finfo(losses.dtype).eps * scaled.norm()
        return along + self.theta * torch.where(there, beside / distance, 0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, theta={self.theta}"
