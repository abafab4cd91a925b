"""Aligned-MTL: task gradients made orthogonal and of one length, then summed by preference."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._spectrum import spectrum
from .base import Method, Solution

ScaleMode = Literal["min", "median", "rmse"]


class AlignedMTL(Method):
    """Weights that replace J by the closest matrix with equal singular values before summing it.

    w = √s·V Λ^(−½) Vᵀ pref over the eigenpairs of G that are numerically there; pref where there are none. The weights
    do not change with the scale of the gradients, so the merged gradient scales with them.

    Args:
        pref_vector: preference for each task, ``[T]``. None: 1/T for each.
        scale_mode: the common squared length s of the aligned gradients. ``min``: the smallest eigenvalue kept, as in
            the paper; ``median`` (the lower one) or ``rmse`` (the mean) of those kept.
    Raises:
        ValueError: ``pref_vector`` has another rank or is not finite; unknown ``scale_mode``. From ``solve``: the
            length of ``pref_vector`` is not T.
    Numerics: eigenvalues up to λ_max·T·2⁻⁵² count as zero. NumPy on a CPU, else torch on the device of G, where
        ``torch.linalg.eigh`` waits for the device.
    Source: Senushkin et al. 2023, Independent Component Alignment for Multi-Task Learning, CVPR, Alg. 1
        (arXiv:2305.19000).
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.AlignedMTL().weights(G)
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min") -> None:
        if pref_vector is not None:
            pref_vector = torch.as_tensor(pref_vector).detach().to(torch.float64)
            if pref_vector.dim() != 1 or not pref_vector.isfinite().all():
                raise ValueError(f"pref_vector must be [T] and finite; found {pref_vector}")
        if scale_mode not in get_args(ScaleMode):
            raise ValueError(f"scale_mode must be one of {', '.join(get_args(ScaleMode))}; found {scale_mode!r}")
        self.pref_vector = pref_vector
        self.scale_mode = scale_mode

    def solve(self, gram: Tensor) -> Solution:
        xp, _, values, vectors, kept, poison = spectrum(gram)
        preference = xp.asarray(self._preference(gram))
        rank = kept.sum(-1)[..., None]
        scale = self._scale(xp, values * kept, kept, rank)
        coordinates = (preference @ vectors) * kept * xp.sqrt(scale / values)
        weights = (vectors @ coordinates[..., None])[..., 0]
        return Solution(torch.as_tensor(xp.where(rank > 0, weights, preference) + poison), None)

    def _preference(self, gram: Tensor) -> Tensor:
        tasks = gram.shape[-1]
        if self.pref_vector is None:
            return gram.new_full((tasks,), 1 / tasks)
        if len(self.pref_vector) != tasks:
            raise ValueError(f"pref_vector must be [{tasks}], one value a task; found {list(self.pref_vector.shape)}")
        return self.pref_vector.to(gram.device)

    def _scale(self, xp: Any, values: Any, kept: Any, rank: Any) -> Any:
        """s ``[..., 1]`` from the eigenvalues, ascending, zero where not kept."""
        if self.scale_mode == "rmse":
            return values.sum(-1)[..., None] / rank.clip(1)
        place = 1 if self.scale_mode == "min" else (rank + 1) // 2
        return (values * (xp.cumsum(kept, -1) == place)).sum(-1)[..., None]

    def __repr__(self) -> str:
        preference = None if self.pref_vector is None else self.pref_vector.tolist()
        return f"AlignedMTL(pref_vector={preference}, scale_mode={self.scale_mode!r})"
