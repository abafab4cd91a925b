"""Losses into one, as published: what a balancer's weighted losses must have the gradient of, by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def imtl_l(losses: Tensor, log_scale: Tensor) -> Tensor:
    """IMTL-L, Liu et al. 2021 (ICLR), sec. 3.2: Σ_t e^(s_t) L_t − s_t."""
    return sum((s.exp() * loss - s for loss, s in zip(losses, log_scale, strict=True)), torch.zeros(()))


def geometric_mean(losses: Tensor) -> Tensor:
    """GLS, arXiv:1904.08492, eq. 2: (Π_t L_t)^(1/T)."""
    return torch.stack([loss ** (1 / len(losses)) for loss in losses]).prod()


def cosmos(losses: Tensor, lambda_: float, preference: Tensor) -> Tensor:
    """COSMOS, arXiv:2103.13392, eq. 5: Σ_t r_t L_t − λ r·L / (‖r‖ ‖L‖)."""
    product = sum((r * loss for r, loss in zip(preference, losses, strict=True)), torch.zeros(()))
    return product - lambda_ * product / (preference.square().sum().sqrt() * losses.square().sum().sqrt())


def pbi(losses: Tensor, theta: float, preference: Tensor, ideal: Tensor) -> Tensor:
    """PBI of MOEA/D, doi:10.1109/TEVC.2007.892759, sec. II.C: d₁ + θ d₂, distances along λ and beside it from z."""
    length = preference.square().sum().sqrt()
    along = ((losses - ideal) @ preference).abs() / length
    return along + theta * (losses - (ideal + along * preference / length)).square().sum().sqrt()
