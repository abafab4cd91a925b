"""IMTL-G: a merged gradient with equal projections onto all task gradients."""

from __future__ import annotations

import numpy as np

from ._compiled import CompiledMethod
from .solvers.problems import Array, CompiledSolver
from .solvers.spectrum import spectrum


class IMTLG(CompiledMethod):
    """Weights that sum to 1 and give the merged gradient the same projection onto every unit task gradient.

    w = v / Σv with v = G⁺ d, where d holds the norms of the task gradients; zero where Σv vanishes (the task gradients
    then have no common direction). Weights may be negative. The merged gradient scales with the gradients.

    Numerics: G⁺ leaves out the eigenvalues up to λ_max·T·2⁻⁵². Σv counts as zero below 1e-12, with the gradients
        scaled to trace G = 1 (TorchJD does not scale them). float64, see ``_compiled.CompiledMethod``.
    Source: Liu et al. 2021, Towards Impartial Multi-task Learning, ICLR; for dependent task gradients Quinton and Rey
        2024, arXiv:2406.16232. Oracle: ``reference.imtlg``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.IMTLG().weights(G)
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    def compiled_solver(self) -> CompiledSolver:
        return CompiledSolver("impartial")

    def solve_on_host(self, gram: Array) -> Array:
        values, vectors, kept = spectrum(gram)
        squared = gram.diagonal(0, 1, 2)
        coordinates = np.matmul(vectors.swapaxes(1, 2), np.sqrt(squared)[:, :, None])
        solution = np.matmul(vectors, (kept / values)[:, :, None] * coordinates)[:, :, 0]
        total = np.add.reduce(solution, axis=1, keepdims=True)
        there = np.abs(total) * np.sqrt(np.add.reduce(squared, axis=1, keepdims=True)) >= 1e-12
        return np.divide(solution, total, out=np.zeros_like(solution), where=there)

    def __repr__(self) -> str:
        return "IMTLG()"
