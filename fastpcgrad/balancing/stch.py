"""Smooth Tchebycheff scalarization: the losses furthest from their ideal weigh most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from .base import task_values
from .scalarization import Scalarization, preferences


class STCH(Scalarization):
    """Weights whose weighted sum of losses has the gradient of μ log Σ_i exp(λ_i (L_i − z_i) / μ).

    That is w_i = λ_i softmax(λ (L − z) / μ)_i. The smaller μ, the closer to the largest λ_i (L_i − z_i) alone. The
    losses should be of comparable size; logarithms of losses over a reference may be given instead of the losses.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
        mu: μ > 0, in the unit of the losses times λ. LibMTL takes 1, of logarithms of losses.
        preference: λ, T numbers > 0; None: 1/T each.
        ideal: z, T numbers: the best loss that each task could reach; None: zeros.
    Attributes:
        preference, ideal: λ and z, buffers; whatever is assigned is looked at as the arguments are.
        weights: those of the last call whose losses were finite; λ/T before it.
    Raises:
        ValueError: ``mu`` not > 0, a preference not > 0, or not T numbers.
    Numerics: losses may have any sign. The largest λ_i (L_i − z_i) is subtracted before the division by μ, so nothing
        overflows. A call with a loss that is not finite weighs by the weights of the call before it.
    Source: Lin et al. 2024, arXiv:2402.19078.
    Example:
        >>> balancer = fastpcgrad.balancing.STCH(2, mu=0.5, preference=[1.0, 1.0])
        >>> balancer(torch.tensor([1.0, 2.0]))
        tensor([0.1192, 1.7616])
    """

    preference: Tensor
    ideal: Tensor
    given = MappingProxyType(
        {"preference": partial(preferences, positive=True), "ideal": partial(task_values, "ideal")}
    )

    def __init__(
        self,
        num_tasks: int | None = None,
        mu: float = 1.0,
        preference: Iterable[float] | Tensor | None = None,
        ideal: Iterable[float] | Tensor | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        if not 0 < mu < float("inf"):
            raise ValueError(f"mu must be a finite number > 0; found {mu!r}")
        weight = preferences(preference, self.num_tasks, positive=True)
        zeros = [0.0] * self.num_tasks
        self.mu = mu
        self.register_buffer("preference", weight)
        self.register_buffer("ideal", task_values("ideal", zeros if ideal is None else ideal, self.num_tasks))
        self._begin_with(weight / self.num_tasks)

    def slopes(self, losses: Tensor) -> Tensor:
        excess = self.preference * (losses - self.ideal)
        return self.preference * torch.softmax((excess - excess.max()) / self.mu, dim=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mu={self.mu}"
