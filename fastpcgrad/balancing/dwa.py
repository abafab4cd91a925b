"""Dynamic weight average: tasks whose loss falls slowly weigh more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Balancer, all_finite


class DWA(Balancer):
    """Weights from how the mean losses of the last two epochs compare: λ_i = T softmax(r_i / temperature).

    r_i = L̄_i(e − 1) / L̄_i(e − 2); in the first two epochs every weight is 1. Calls in training mode add to the mean of
    the running epoch; after ``eval()`` they do not. A step with a loss that is not finite is not in the mean, and an
    epoch of such steps alone is none.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
        temperature: of the softmax, > 0; larger makes the weights more equal.
    Attributes:
        weights: λ, ``[T]``; they sum to T.
    Raises:
        ValueError: ``temperature`` is not > 0.
    Numerics: mean losses have to be > 0, since r compares them by their ratio; see ``end_epoch``.
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
    counted: Tensor

    def __init__(
        self,
        num_tasks: int | None = None,
        temperature: float = 2.0,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0; found {temperature!r}")
        self.temperature = temperature
        self.register_buffer("weights", torch.ones(self.num_tasks))
        self.register_buffer("loss_sum", torch.zeros(self.num_tasks))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
        # A mean of 0 is that of no epoch.
        self.register_buffer("epoch_losses", torch.zeros(2, self.num_tasks))
        # Known without looking at the device, but not of a state that was loaded.
        self._without_losses = True
        self.register_load_state_dict_post_hook(_may_have_losses)

    def weigh(self, losses: Tensor) -> Tensor:
        if self.training:
            finite = all_finite(losses)
            self.loss_sum += torch.where(finite, losses, 0.0)
            self.counted += finite
            self._without_losses = False
        return self.weights

    def end_epoch(self) -> None:
        """Take the mean losses of the epoch that ended and make the weights of the next one.

        Raises:
            RuntimeError: no call since the last epoch ended.
            ValueError: a mean loss that is not > 0, or out of proportion to the one before; see ``Balancer`` for when.
                Nothing is changed.
        """
        self._refusals.raise_due()
        if self._without_losses:
            raise RuntimeError("end_epoch() of an epoch without losses: call the balancer in training mode first")
        before, last = self.epoch_losses[1], self.loss_sum / self.counted
        exponents = last / before / self.temperature
        comparable = exponents.isfinite() | (before == 0)
        bad = (self.counted > 0) & ~((last > 0) & last.isfinite() & comparable)
        self._refusals.refuse(bad, (before, last), _why_not)
        ended = (self.counted > 0) & ~bad.any()
        weights = self.num_tasks * torch.softmax(exponents, dim=0)
        self.weights = torch.where(ended & (before > 0).all(), weights, self.weights)
        self.epoch_losses = torch.where(ended, torch.stack([before, last]), self.epoch_losses)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.counted = torch.zeros_like(self.counted)
        self._without_losses = True

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


def _why_not(task: int, values: list[float]) -> str:
    before, last = values
    after = f" after one of {before:.6g}" if before else ""
    return (
        f"task {task} ends the epoch with a mean loss of {last:.6g}{after}: DWA takes the ratio of the means of two "
        "epochs, which have to be > 0; STCH takes losses of any sign"
    )


def _may_have_losses(balancer: DWA, _: object) -> None:
    balancer._without_losses = False
