"""Methods that keep something as large as J: one step, from what was kept to the merged gradient and what is kept.

Vectors and loops; states are arguments and results. Tasks that are absent are left out by the caller, rows and states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from .directions import conflict_free


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


def bloop(
    rows: Tensor, average: Tensor | None, lambda_: float = 0.1, ema: float = 0.1, eps: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """Bloop as its authors' code has it, arXiv:2402.02998: the merged gradient ``[N]``, and m.

    m' = m + ema (g₀ − m); d = g₀ + λ Σ_{t ≥ 1} (g_t − g_t·m' / (m'·m' + eps) m').

    Args:
        average: m ``[N]``; None at first, when it is g₀.
    """
    main = rows[0].double()
    after = main if average is None else average + ema * (main - average)
    merged = main
    for row in rows[1:].double():
        merged = merged + lambda_ * (row - row @ after / (after @ after + eps) * after)
    return merged, after


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


class Momenta(NamedTuple):
    """What M-ConFIG keeps, zeros at first: m ``[T, N]``, n ``[T]``; of the merged gradient its momentum, its second
    moment, and the steps."""

    momenta: Tensor
    times: list[int]
    pseudo: Tensor
    squares: Tensor
    step: int


def momentum_config(
    rows: Mapping[int, Tensor],
    kept: Momenta,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    pref_vector: Sequence[float] | None = None,
) -> tuple[Tensor, Momenta]:
    """M-ConFIG as its authors' code has it, arXiv:2408.11104, Alg. 1: the merged gradient ``[N]``, and what is kept.

    m_t' = β₁ m_t + (1 − β₁) g_t of the tasks that are there; d = ConFIG of all m_t' / (1 − β₁^{n_t}), zero while some
    n_t = 0. Then p' = (1 − β₁^k) d, the pseudo-gradient (p' − β₁ p) / (1 − β₁), whose square goes into s, and
    d / (√(s' / (1 − β₂^k)) + 1e-8).

    Args:
        rows: g_t of the tasks that are there.
    """
    momenta, times = kept.momenta.clone(), list(kept.times)
    for task, row in rows.items():
        momenta[task] = beta_1 * momenta[task] + (1 - beta_1) * row.double()
        times[task] += 1
    if 0 in times:
        return torch.zeros_like(kept.pseudo), kept._replace(momenta=momenta, times=times)
    hats = torch.stack([m / (1 - beta_1**n) for m, n in zip(momenta, times, strict=True)])
    direction = conflict_free(hats, pref_vector) @ hats
    step = kept.step + 1
    pseudo = (1 - beta_1**step) * direction
    gradient = (pseudo - beta_1 * kept.pseudo) / (1 - beta_1)
    squares = beta_2 * kept.squares + (1 - beta_2) * gradient * gradient
    merged = direction / ((squares / (1 - beta_2**step)).sqrt() + 1e-8)
    return merged, Momenta(momenta, times, pseudo, squares, step)
