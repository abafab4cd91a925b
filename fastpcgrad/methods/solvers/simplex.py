"""The minimum of a slope plus a norm over the simplex, exactly, by going from face to face."""

from __future__ import annotations

import numpy as np

from .problems import Array, Indices

SMOOTHING = 1e-9
"""‖w‖_G stands for √(wᵀGw + SMOOTHING²): without a kink at zero every face that can go down shows it."""

TOLERANCE = 1e-13
"""Stop where no corner lies lower than the face by more than this fraction of the largest slope."""


def minimum(gram: Array, slopes: Array, factor: float) -> Array:
    """The w ``[T]`` on the simplex where slopes·w + factor·‖w‖_G is smallest.

    Wolfe's scheme for the point of least norm, with slopes: the corner with the steepest way down joins the face, and w
    goes to the minimum of the face; the corners at which it would leave the simplex drop out on the way.

    Args:
        gram: ``[T, T]`` float64, positive semidefinite, trace 1.
        slopes: ``[T]``.
        factor: positive.
    Source: Wolfe 1976, Finding the nearest point in a polytope, doi:10.1007/BF01580381.
    """
    tasks = len(gram)
    corner = np.argmin(slopes + factor * np.sqrt(gram.diagonal()))
    face = np.array([corner])
    best = w = np.eye(tasks)[corner]
    lowest = np.inf
    for _ in range(20 * tasks):  # every round ends lower, on another face; about T rounds suffice
        products = gram @ w
        norm = np.sqrt(max(products @ w, 0.0) + SMOOTHING**2)
        height = slopes @ w + factor * norm
        if not height < lowest:  # nothing but rounding is left
            break
        best, lowest = w, height
        gradient = slopes + factor / norm * products
        corner = gradient.argmin()
        if gradient[corner] >= gradient @ w - TOLERANCE * np.abs(gradient).max() or corner in face:
            break
        try:
            w, face = _descend(gram, slopes, factor, w, np.append(face, corner))
        except np.linalg.LinAlgError:  # the corner lies in the affine hull of the face
            break
    return best


def _descend(gram: Array, slopes: Array, factor: float, w: Array, face: Indices) -> tuple[Array, Indices]:
    """The minimum over the face, or over what is left of it, and that face."""
    weights = w[face]
    while True:
        count = len(face)
        within = gram[np.ix_(face, face)]
        system = np.ones((count + 1, count + 1))
        system[:count, :count] = within
        system[count, count] = 0.0
        sides = np.zeros((count + 1, 2))
        sides[count, 0] = 1.0
        sides[:count, 1] = -slopes[face]
        # In the affine hull u has the least norm, and the minimum is u + (norm/factor)·v with Σu = 1, Σv = 0.
        u, v = np.linalg.solve(system, sides)[:count].T
        steepness = factor**2 - v @ within @ v
        if steepness > 0:
            direction = u + np.sqrt((max(u @ within @ u, 0.0) + SMOOTHING**2) / steepness) * v - weights
            reach = 1.0
        else:  # it falls for ever along v
            direction, reach = v, np.inf
        falling = direction < 0
        lengths = np.where(falling, -weights / np.where(falling, direction, -1.0), np.inf)
        first = lengths.argmin()
        weights = weights + min(lengths[first], reach) * direction
        if lengths[first] >= reach or count == 1:
            break
        weights[first] = 0.0
        stays = weights > 0
        face, weights = face[stays], weights[stays]
    w = np.zeros_like(w)
    w[face] = weights
    return w, face
