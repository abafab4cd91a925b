"""What balancers share whose weights are the gradient of one function of the losses of the call itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .._modes import is_fake
from .base import Balancer, all_finite, task_values


class Scalarization(Balancer):
    """Weights w_i = ∂s/∂L_i, so that the sum of the weighted losses has the gradient of a scalarization s(L).

    A subclass gives ``slopes``, and the weights before any call. A call with a loss that is not finite weighs by the
    weights of the call before it.
    """

    given: Mapping[str, Callable[[Any, int], Tensor]] = MappingProxyType({})
    """Buffers that may be set anew, each with what makes it ``[T]`` of what was given, or refuses that."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.given and name in self._buffers:
            value = self.given[name](value, self.num_tasks).to(self._buffers[name])
        super().__setattr__(name, value)

    def _begin_with(self, weights: Tensor) -> None:
        # Those of the last call: made anew by every call, so no part of the state.
        self.register_buffer("weights", weights, persistent=False)

    @abstractmethod
    def slopes(self, losses: Tensor) -> Tensor:
        """∂s/∂L, ``[T]``; not finite where there is none."""

    def weigh(self, losses: Tensor) -> Tensor:
        slopes = self.slopes(losses)
        self.weights = torch.where(all_finite(losses, slopes), slopes, self.weights)
        return self.weights


def preferences(values: Iterable[float] | Tensor | None, num_tasks: int, *, positive: bool = False) -> Tensor:
    """How much each task is wanted, ``[T]``; None: 1/T each.

    Raises:
        ValueError: not T finite numbers, one below 0 (with ``positive``: or 0), or zeros alone.
    """
    weight = task_values("preference", [1 / num_tasks] * num_tasks if values is None else values, num_tasks)
    if is_fake(weight):
        return weight
    if positive and not (weight > 0).all():
        raise ValueError(f"preference must be > 0 for every task; found {weight.tolist()}")
    if (weight < 0).any() or not weight.any():
        raise ValueError(f"preference must be >= 0 for every task, and > 0 for one; found {weight.tolist()}")
    return weight
