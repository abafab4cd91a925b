"""Dynamic weight average: tasks whose loss falls slowly weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Balancer


class DWA(Balancer):
    """Weights from how the mean losses of the last two epochs compare: λ_i = T softmax(r_i / temperature).

    r_i = L̄_i(e − 1) / L̄_i(e − 2); in the first two epochs every weight is 1. Calls in training mode add to the mean of
    the running epoch; after ``eval()`` they do not.

    Args:
        num_tasks: T.
        temperature: of the softmax, > 0; larger makes the weights more equal.
    Attributes:
        weights: λ, ``[T]``; they sum to T.
    Raises:
        ValueError: ``temperature`` is not > 0.
    Numerics: a NaN loss gives NaN weights in the two epochs that look at its epoch.
    Source: Liu, Johns, Davison 2019, arXiv:1803.10704.
    Example:
        >>> balancer = fastpcgrad.balancing.DWA(2)
        >>> for losses in ([4.0, 4.0], [1.0, 4.0]):
        ...     weighted = balancer(torch.tensor(losses))
        ...     balancer.end_epoch()
        >>> balancer.weights  # the second task's loss did not fall
        tensor([0.8147, 1.1853])
    """

    epoch_losses: Tensor
    loss_sum: Tensor

    def __init__(self, num_tasks: int, temperature: float = 2.0) -> None:
        super().__init__(num_tasks)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0; found {temperature!r}")
        self.temperature = temperature
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("loss_sum", torch.zeros(num_tasks))
        self.register_buffer("epoch_losses", torch.zeros(2, num_tasks))
        self.steps = 0
        self.epochs = 0

    def weigh(self, losses: Tensor) -> Tensor:
        if self.training:
            self.loss_sum += losses
            self.steps += 1
        return self.weights

    def end_epoch(self) -> None:
        """Take the mean losses of the epoch that ended and make the weights of the next one.

        Raises:
            RuntimeError: no call since the last epoch ended.
        """
        if self.steps == 0:
            raise RuntimeError("end_epoch() of an epoch without losses: call the balancer in training mode first")
        self.epoch_losses = torch.stack([self.epoch_losses[1], self.loss_sum / self.steps])
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.steps = 0
        self.epochs += 1
        if self.epochs >= 2:
            before, last = self.epoch_losses
            self.weights = self.num_tasks * torch.softmax(last / before / self.temperature, dim=0)

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps, "epochs": self.epochs}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps, self.epochs = state["steps"], state["epochs"]

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, temperature={self.temperature}"
