"""MoCo: MGDA's direction from running averages of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ._shares import Shares
from .base import Solution
from .tracking import Row, Tracked, Tracking, loaded_shares

_EPS = 1e-8
"""Added to the norms of task gradients, as in LibMTL."""


class MoCo(Tracking):
    """Averages of task gradients, in which the noise of batches cancels, weighted by λ that moves towards MGDA's.

    In step k, y_t ← y_t − β_k (y_t − L_t g_t/‖g_t‖) for each task, λ ← softmax(λ − γ_k (Y Yᵀ + ρ I) λ), and the merged
    gradient is λ Y; β_k = ``beta``/k^``beta_sigma``, and γ_k likewise.

    State: see ``Tracking``, and λ by the index of the task, ``weights``. In a step where tasks are absent, the others
    share what is theirs.

    Args:
        beta, beta_sigma: of the averages; β_1 in (0, 1].
        gamma, gamma_sigma: of the weights' steps; not negative.
        rho: ρ, not negative.
        normalize: take L_t g_t/‖g_t‖ for a task's gradient, as LibMTL does, where L_t is its loss: of losses or
            functions that surgeries run backward, not of what is run inside ``task(t)``. False: g_t, as the paper.
    Raises:
        ValueError: an argument is out of range. When merging: see ``Tracking``; losses are not known.
    Numerics: see ``Tracking``. 1e-8 is added to ‖g_t‖. A loss that is not finite counts as such a gradient.
    Source: Fernando et al. 2023, Mitigating Gradient Bias in Multi-objective Learning, ICLR (MoCo), as LibMTL has it.
        Oracle: ``reference.moco``.
    Example:
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = fastpcgrad.PCGrad(torch.optim.SGD([x], lr=0.1), method=fastpcgrad.methods.MoCo())
        >>> optimizer.pc_backward([(x[0] - 1).square(), (x[1] - 2).square()])
        >>> x.grad
        tensor([-0.2734, -0.9065])
    """

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        normalize: bool = True,
    ) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1]; found {beta!r}")
        given = {"beta_sigma": beta_sigma, "gamma": gamma, "gamma_sigma": gamma_sigma, "rho": rho}
        for name, value in given.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative; found {value!r}")
        self.beta, self.beta_sigma, self.gamma, self.gamma_sigma = beta, beta_sigma, gamma, gamma_sigma
        self.rho, self.normalize = rho, normalize
        self.needs_losses = normalize
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self._shares = Shares()

    def track(self, tasks: Sequence[int], rows: Sequence[Row], gram: Tensor, losses: Sequence[float]) -> Tracked | None:
        scales = [1.0] * len(tasks)
        if self.normalize:
            norms = gram.diagonal().sqrt().tolist()
            scales = [loss / (norm + _EPS) for loss, norm in zip(losses, norms, strict=True)]
            if not all(map(isfinite, scales)):
                return None
        self._step += 1
        beta = self.beta / self._step**self.beta_sigma
        return Tracked(tasks, self.averaged(tasks, rows, 1 - beta, [beta * scale for scale in scales]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        shares = self._shares.of(gram, tasks)
        gamma = self.gamma / self._step**self.gamma_sigma
        shares = torch.softmax(shares - gamma * (gram @ shares + self.rho * shares), dim=0)
        self._shares.put(shares, tasks)
        return Solution(shares, None)

    state_keys = (*Tracking.state_keys, "weights")

    def state_dict(self) -> dict[str, Any]:
        """See ``Tracking``, and ``weights``: λ, ``[T]`` float64 of mean 1, or None before the first step."""
        return {**super().state_dict(), "weights": self._shares.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        shares = loaded_shares("weights", state["weights"])
        super().load_state_dict(state)
        self._shares = shares

    def __repr__(self) -> str:
        return (
            f"MoCo(beta={self.beta!r}, beta_sigma={self.beta_sigma!r}, gamma={self.gamma!r}, "
            f"gamma_sigma={self.gamma_sigma!r}, rho={self.rho!r}, normalize={self.normalize!r})"
        )
