"""Methods on the task gradients of several independent batches: MoDo and SDMGrad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def modo(batches: Sequence[Tensor], shares: Tensor, gamma: float = 0.1, rho: float = 0.1) -> tuple[Tensor, Tensor]:
    """MoDo, JMLR 25 (2024), eq. 2.9: the merged gradient ``[N]``, and the next λ ``[T]``.

    λ' = Π(λ − γ (J₁ (λ J₂)ᵀ + ρ λ)); d = λ' (J₁ + J₂)/2, or λ' J₃ where there is a third batch.

    Args:
        batches: J₁, J₂ and maybe J₃, each ``[T, N]``.
        shares: λ ``[T]``.
    """
    first, second = batches[0].double(), batches[1].double()
    mixed = shares.double() @ second
    slope = torch.stack([row @ mixed for row in first]) + rho * shares
    after = simplex_point(shares.double() - gamma * slope)
    mean = (first + second) / 2 if len(batches) == 2 else batches[2].double()
    return after @ mean, after


def sdmgrad(
    batches: Sequence[Tensor],
    shares: Tensor,
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
    lambda_: float = 0.3,
    pref_vector: Sequence[float] | None = None,
    norm_eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """SDMGrad, arXiv:2305.18409, Alg. 1, with the inner SGD and the scale of its code: the merged gradient, the next w.

    v ← μ v + J₁ ((w + λ w̃) J₂) / (s² + ε), w ← Π(w − lr v), ``n_iter`` times; d = (w + λ w̃) J₃ / (1 + λ). s is the mean
    of √max(0, g¹_t·g²_t).

    Args:
        batches: J₁, J₂, J₃, each ``[T, N]``.
        shares: w ``[T]``.
        pref_vector: w̃; None: 1/T each.
    """
    first, second, third = (rows.double() for rows in batches)
    tasks, w = len(first), shares.double()
    wanted = torch.tensor([1 / tasks] * tasks if pref_vector is None else list(pref_vector), dtype=torch.float64)
    lengths = [max(0.0, float(a @ b)) ** 0.5 for a, b in zip(first, second, strict=True)]
    squared = (sum(lengths) / tasks) ** 2 + norm_eps
    velocity = torch.zeros(tasks, dtype=torch.float64)
    for _ in range(n_iter):
        mixed = (w + lambda_ * wanted) @ second
        velocity = momentum * velocity + torch.stack([row @ mixed for row in first]) / squared
        w = simplex_point(w - lr * velocity)
    return (w + lambda_ * wanted) @ third / (1 + lambda_), w


def simplex_point(point: Tensor) -> Tensor:
    """The nearest point of the simplex: (y − τ)⁺ for the τ that makes it sum to 1.

    The sum falls as τ grows, and is linear between two entries: the τ of each number of largest entries is tried.
    """
    descending = sorted(point.tolist(), reverse=True)
    threshold = descending[0] - 1
    for count in range(1, len(descending) + 1):
        tried = (sum(descending[:count]) - 1) / count
        if descending[count - 1] > tried:
            threshold = tried
    return (point - threshold).clamp(min=0)
