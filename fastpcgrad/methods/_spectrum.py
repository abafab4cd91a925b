"""Eigenvalues and eigenvectors of a batch of Gram matrices, for the methods that need a (pseudo)inverse."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._problems import in_place

EPS = float(np.finfo(np.float64).eps)


class Spectrum(NamedTuple):
    """G = V Λ Vᵀ and what of it is numerically there, as arrays of ``xp``.

    Attributes:
        xp: numpy or torch, see ``_problems.in_place``.
        gram: G, ``[..., T, T]``, zero where it is not finite.
        values: Λ, ``[..., T]``, ascending; 1 where not kept, so that they can be divided by.
        vectors: V, ``[..., T, T]``, one eigenvector a column.
        kept: ``[..., T]`` bool: the eigenvalues above λ_max·T·2⁻⁵²; as many as the numerical rank.
        poison: ``[..., 1]``: 0 where G is finite, else NaN.
    """

    xp: Any
    gram: Any
    values: Any
    vectors: Any
    kept: Any
    poison: Any


def spectrum(gram: Tensor) -> Spectrum:
    """The eigendecomposition of ``gram``, ``[T, T]`` or ``[S, T, T]`` float64, without an error for NaN or inf.

    On CUDA ``torch.linalg.eigh`` itself waits for the device.

    Raises:
        ValueError: ``gram`` is of another shape or dtype.
    """
    xp, array, finite = in_place(gram)
    # NumPy's LAPACK has threads of its own, which from T = 32 or so wait for torch's spinning ones: milliseconds.
    values, vectors = map(xp.asarray, torch.linalg.eigh(torch.as_tensor(array)))
    kept = values > values[..., -1:] * (array.shape[-1] * EPS)
    poison = xp.where(finite, 0.0, xp.nan)[..., None]
    return Spectrum(xp, array, xp.where(kept, values, 1.0), vectors, kept, poison)
