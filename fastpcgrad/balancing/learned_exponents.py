"""What balancers share whose weights are exponentials that are learned with the network."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import Balancer


class LearnedExponents(Balancer):
    """L_i becomes a (e^(x_i) L_i − x_i), a the ``factor``, with exponents x that follow a learned parameter.

    The weighted losses carry the parameter's gradient, which a loss that is not finite leaves at exactly 0.
    """

    factor: float

    @property
    @abstractmethod
    def exponents(self) -> Tensor:
        """x, ``[T]``, with its graph."""

    @property
    def weights(self) -> Tensor:  # type: ignore[override]
        return self.factor * self.exponents.detach().exp()

    def weigh(self, losses: Tensor) -> Tensor:
        return self.factor * self._learning(losses).exp()

    def _weighted(self, losses: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        weighted = super()._weighted(losses)
        gain = self.factor * self._learning(self._vector("losses", weighted))
        if isinstance(weighted, Tensor):
            return weighted - gain.view_as(weighted)
        return [loss - part for loss, part in zip(weighted, gain.unbind(), strict=True)]

    def _learning(self, losses: Tensor) -> Tensor:
        """x, with a gradient where the loss is finite."""
        exponents = self.exponents
        return torch.where(losses.isfinite(), exponents, exponents.detach())
