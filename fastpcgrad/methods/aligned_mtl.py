"""Aligned-MTL: task gradients made orthogonal and of one length, then summed by preference."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from .._named import named
from ._compiled import CompiledMethod
from ._task_vector import Preference, TaskVector, preferences, shown, task_vector
from .base import Solution
from .solvers.problems import Array, CompiledSolver, Flags, Indices
from .solvers.spectrum import EPS, spectrum

ScaleMode = Literal["min", "median", "rmse"]


class _Variant(NamedTuple):
    eps: float
    """Eigenvalues up to λ_max·T·eps count as zero."""
    sums: bool
    """Whether the aligned gradients are summed where there is no preference; else they are averaged."""


_FP32 = 2.0**-23
_VARIANTS = {
    "torchjd": _Variant(EPS, False),
    "torchjd-fp32": _Variant(_FP32, False),
    "samsunglabs": _Variant(_FP32, True),
}


class AlignedMTL(CompiledMethod):
    """Weights that replace J by the closest matrix with equal singular values before summing it.

    w = √s·V Λ^(−½) Vᵀ pref over the eigenpairs of G that are numerically there; pref where there are none. The weights
    do not change with the scale of the gradients, so the merged gradient scales with them.

    Args:
        pref_vector: preference of each task, ``[T]``; None: 1/T each.
        scale_mode: the common squared length s of the aligned gradients. ``min``: the smallest eigenvalue kept, as in
            the paper; ``median`` (the lower one) or ``rmse`` (the mean) of those kept.
        variant: whose eigenvalues count as zero, and what is done without preferences. ``torchjd``: those up to
            λ_max·T·2⁻⁵², and the mean, as TorchJD with float64 rows. ``torchjd-fp32``: those up to λ_max·T·2⁻²³, as
            TorchJD with fp32 rows. ``samsunglabs``: these, and the sum of the aligned gradients, as the authors' code
            and LibMTL. Where task gradients nearly depend on each other the merged gradients of the first and the
            others differ by orders of magnitude, see docs/variants.md.
    Raises:
        TypeError, ValueError: a bad preference vector; unknown ``scale_mode`` or ``variant``; when solving, a number of
            tasks that does not fit.
    Numerics: float64, see ``_compiled.CompiledMethod``.
    Source: Senushkin et al. 2023, Independent Component Alignment for Multi-Task Learning, CVPR, Alg. 1
        (arXiv:2305.19000). Oracle: ``reference.aligned_mtl``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.AlignedMTL().weights(G)
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """

    def __init__(
        self, pref_vector: TaskVector | None = None, scale_mode: ScaleMode = "min", variant: str = "torchjd"
    ) -> None:
        if scale_mode not in get_args(ScaleMode):
            raise ValueError(f"scale_mode must be one of {', '.join(get_args(ScaleMode))}; found {scale_mode!r}")
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        self.scale_mode = scale_mode
        self.variant = variant
        self._rule = named("variant", variant, _VARIANTS)
        self._preference = Preference()

    def compiled_solver(self) -> CompiledSolver:
        return CompiledSolver("aligned", (float(get_args(ScaleMode).index(self.scale_mode)), self._rule.eps))

    def solve(self, gram: Tensor) -> Solution:
        weights = super().solve(gram).weights
        sums = self._rule.sums and self.pref_vector is None
        return Solution(weights * gram.shape[-1] if sums else weights, None)

    def preference(self, gram: Tensor) -> Tensor | None:
        return self._preference.on(gram.device, self.pref_vector, gram.shape[-1])

    def solve_on_host(self, gram: Array) -> Array:
        preference = preferences(self.pref_vector, gram.shape[-1]).numpy()
        values, vectors, kept = spectrum(gram, self._rule.eps)
        rank = kept.sum(axis=1, keepdims=True)
        scale = self._scale(values * kept, kept, rank)
        coordinates = np.matmul(preference, vectors) * (kept * np.sqrt(scale / values))
        weights = np.matmul(vectors, coordinates[:, :, None])[:, :, 0]
        return np.where(rank > 0, weights, preference)

    def _scale(self, values: Array, kept: Flags, rank: Indices) -> Array:
        """s ``[S, 1]`` from the eigenvalues, ascending, zero where not kept."""
        if self.scale_mode == "rmse":
            return values.sum(axis=1, keepdims=True) / rank.clip(1)
        place = 1 if self.scale_mode == "min" else (rank + 1) // 2
        found: Array = (values * (np.cumsum(kept, axis=1) == place)).sum(axis=1, keepdims=True)
        return found

    def __repr__(self) -> str:
        return (
            f"AlignedMTL(pref_vector={shown(self.pref_vector)}, scale_mode={self.scale_mode!r}, "
            f"variant={self.variant!r})"
        )
