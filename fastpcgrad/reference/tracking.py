"""Methods that keep something as large as J: one step, from what was kept to the merged gradient and what is kept.

Vectors and loops; states are arguments and results. Tasks that are absent are left out by the caller, rows and states.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import torch
from torch import Tensor


def moco(
    rows: Tensor,
    losses: Sequence[float] | None,
    kept: Tensor,
    shares: Tensor,
    step: int,
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """MoCo as LibMTL has it, after Fernando et al. 2023 (ICLR), eq. 7 to 9: the merged gradient ``[N]``, Y, λ.

    y_t' = y_t − β_k (y_t − h_t) with h_t = L_t g_t / (‖g_t‖ + 1e-8), or g_t without losses;
    λ' = softmax(λ − γ_k (Y' Y'ᵀ + ρ I) λ); d = λ' Y'.

    Args:
        kept: Y ``[T, N]``, zeros at first.
        shares: λ ``[T]``, 1/T each at first.
        step: k, 1 at first.
    """
    rate, pace = beta / step**beta_sigma, gamma / step**gamma_sigma
    after = []
    for t, row in enumerate(rows.double()):
        target = row if losses is None else row / (row.norm() + 1e-8) * losses[t]
        after.append(kept[t] - rate * (kept[t] - target))
    mixed = sum(share * y for share, y in zip(shares, after, strict=True))
    slopes = torch.stack([y @ mixed + rho * share for y, share in zip(after, shares, strict=True)])
    exponentials = torch.exp(shares - pace * slopes)
    next_shares = exponentials / exponentials.sum()
    return sum(share * y for share, y in zip(next_shares, after, strict=True)), torch.stack(after), next_shares


def excess_mtl(
    rows: Tensor,
    kept: Tensor,
    shares: Tensor,
    baselines: Sequence[float | None],
    robust_step_size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """ExcessMTL as TorchJD has it, after He et al. 2024 (PMLR 235), eq. 6, 7 and 9: the merged gradient, S, α, and E.

    S_t' = S_t + g_t²; E_t = Σ_n g_tn² / √(S_tn' + 1e-7); α_t' ∝ α_t exp(η E_t / (E⁰_t + 1e-7)), or α_t exp(η E_t) for a
    task without a baseline E⁰, which then is this E_t; d = Σ_t α_t' g_t. In the warmup α stays: of a call there the
    caller takes S and E alone.

    Args:
        kept: S ``[T, N]``, zeros at first.
        shares: α ``[T]``, 1/T each at first.
        baselines: E⁰, after the warmup the mean E_t of its steps.
    """
    after, risks, exponents = [], [], []
    for t, row in enumerate(rows.double()):
        squares = kept[t] + row * row
        risk = float(sum(g * g / (s + 1e-7) ** 0.5 for g, s in zip(row, squares, strict=True)))
        known = baselines[t]
        exponents.append(robust_step_size * (risk if known is None else risk / (known + 1e-7)))
        after.append(squares)
        risks.append(risk)
    # the largest exponent is taken from all, for no exponential to overflow
    growth = [exp(exponent - max(exponents)) for exponent in exponents]
    grown = torch.stack([share * factor for share, factor in zip(shares, growth, strict=True)])
    weights = grown / grown.sum()
    return sum(w * row for w, row in zip(weights, rows.double(), strict=True)), torch.stack(after), weights, risks


def db_mtl(rows: Tensor, kept: Tensor, step: int, beta: float = 0.9, beta_sigma: float = 0.0) -> tuple[Tensor, Tensor]:
    """DB-MTL's gradient half as LibMTL has it, after arXiv:2308.12029, Alg. 1: the merged gradient ``[N]``, and b.

    b_t' = g_t + β_k (b_t − g_t); d = Σ_t max_s ‖b_s'‖ / (‖b_t'‖ + 1e-8) b_t'.

    Args:
        kept: b ``[T, N]``, zeros at first.
        step: k, 1 at first.
    """
    rate = beta / step**beta_sigma
    after = [row + rate * (own - row) for row, own in zip(rows.double(), kept, strict=True)]
    longest = max(own.norm() for own in after)
    return torch.stack([longest / (own.norm() + 1e-8) * own for own in after]).sum(dim=0), torch.stack(after)
