"""GradVac: task gradients turned until their cosines reach running targets."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor


def gradvac(
    rows: Tensor, orders: Sequence[Sequence[int]], targets: Tensor, beta: float = 0.5, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient Vaccine, arXiv:2010.05874, Alg. 1: the turned task gradients ``[T, N]``, and the targets after it.

    Args:
        orders: for each i, the others j in the order of their turns.
        targets: φ̂ ``[T, T]``, the target of each pair.
        beta: φ̂ ← (1 − β) φ̂ + β φ.
        eps: added to both denominators, as TorchJD does. With 0, as in the paper, what would divide by zero is left
            out: a zero gradient has cosine 0 and turns nothing, and a target of 1 is out of reach.
    """
    original, targets = rows.double(), targets.clone()
    turned = []
    for i, order in enumerate(orders):
        row = original[i].clone()
        for j in order:
            other = original[j]
            length, other_length, target = float(row.norm()), float(other.norm()), float(targets[i, j])
            both = length * other_length + eps
            cosine = min(1.0, max(-1.0, float(row @ other) / both)) if both > 0 else 0.0
            across = other_length * sqrt(1 - target * target) + eps
            if cosine < target and across > 0:
                # what comes out has the target as its cosine with the other
                factor = length * (target * sqrt(1 - cosine * cosine) - cosine * sqrt(1 - target * target)) / across
                row = row + factor * other
            targets[i, j] = (1 - beta) * target + beta * cosine
        turned.append(row)
    return torch.stack(turned), targets
