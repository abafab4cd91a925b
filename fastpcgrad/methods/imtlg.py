"""IMTL-G: a merged gradient with equal projections onto all task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ._spectrum import spectrum
from .base import Method, Solution


class IMTLG(Method):
    """Weights that sum to 1 and give the merged gradient the same projection onto every unit task gradient.

    w = v / Σv with v = G⁺ d, where d holds the norms of the task gradients; zero where Σv vanishes (the task gradients
    then have no common direction). Weights may be negative. The merged gradient scales with the gradients.

    Numerics: G⁺ leaves out the eigenvalues up to λ_max·T·2⁻⁵². Σv counts as zero below 1e-12, with the gradients
        scaled to trace G = 1 (TorchJD does not scale them). NumPy on a CPU, else torch on the device of G,
        where ``torch.linalg.eigh`` waits for the device.
    Source: Liu et al. 2021, Towards Impartial Multi-task Learning, ICLR; for dependent task gradients Quinton and Rey
        2024, arXiv:2406.16232.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.IMTLG().weights(G)
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    def solve(self, gram: Tensor) -> Solution:
        xp, array, values, vectors, kept, poison = spectrum(gram)
        squared = array.diagonal(0, -2, -1)
        coordinates = (xp.sqrt(squared)[..., None, :] @ vectors)[..., 0, :] * kept / values
        solution = (vectors @ coordinates[..., None])[..., 0]
        total = solution.sum(-1)[..., None]
        there = xp.abs(total) * xp.sqrt(squared.sum(-1))[..., None] >= 1e-12
        weights = xp.where(there, solution / xp.where(there, total, 1.0), 0.0)
        return Solution(torch.as_tensor(weights + poison), None)

    def __repr__(self) -> str:
        return "IMTLG()"
