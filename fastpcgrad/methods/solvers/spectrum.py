"""Eigenvalues and eigenvectors of a batch of Gram matrices, for the methods that need a (pseudo)inverse."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .problems import Array, Flags

EPS = float(np.finfo(np.float64).eps)


class Spectrum(NamedTuple):
    """G = V Λ Vᵀ and what of it is numerically there.

    Attributes:
        values: Λ, ``[S, T]``, ascending; 1 where not kept, so that they can be divided by.
        vectors: V, ``[S, T, T]``, one eigenvector a column.
        kept: ``[S, T]``: the eigenvalues above λ_max·T·eps; as many as the numerical rank.
    """

    values: Array
    vectors: Array
    kept: Flags


def spectrum(gram: Array, eps: float = EPS) -> Spectrum:
    """The eigendecomposition of finite Gram matrices, ``[S, T, T]`` float64, whose numbers have this eps."""
    # NumPy's LAPACK has threads of its own, which from T = 32 or so wait for torch's spinning ones: milliseconds.
    found, vectors = torch.linalg.eigh(torch.from_numpy(gram))
    values: Array = found.numpy()
    kept = values > values[:, -1:] * (gram.shape[-1] * eps)
    return Spectrum(np.where(kept, values, 1.0), vectors.numpy(), kept)
