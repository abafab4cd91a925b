"""The convex problem that Nash-MTL and FairGrad share: G x = x^(−1/α) with x > 0."""

from __future__ import annotations

import numpy as np

from .problems import Array, CompiledSolver, Flags

RIDGE = 1e-10
"""Added to the unit diagonal of the cosines. At a Pareto-stationary point there is no solution and x would grow without
bound; with the ridge x_i‖g_i‖ stays below √(T/RIDGE) for α = 1. Where it changes little the problem is then solved
without it."""

BACKWARD_ERROR = 1e-14
"""Stop where both sides of the equation agree to this fraction of the terms that they are made of."""

SMALLEST = 1e-200
"""What no y falls below, so that nothing overflows."""


def solver(alpha: float, max_iters: int) -> CompiledSolver:
    """What ``solve`` does, compiled."""
    return CompiledSolver("fairness", (alpha, float(max_iters)))


def solve(gram: Array, alpha: float, max_iters: int) -> Array:
    """x > 0 ``[S, T]`` with G x = x^(−1/α), by damped Newton; zero for a task whose gradient is zero.

    x is the minimum of ½xᵀGx − Σφ(x_i) with φ' = x^(−1/α), which is convex. With y_i = ‖g_i‖x_i and the cosines Ĝ it
    reads (Ĝ y)_i = (‖g_i‖/y_i)^(1/α)/‖g_i‖, so gradients of very different lengths do no harm.

    Args:
        gram: ``[S, T, T]`` float64, finite.
        alpha: positive.
        max_iters: the most Newton steps, with the ridge and again without it; when they are spent the last iterate is
            the answer.
    Numerics: x G to about 1e-12 of Σ x_i‖g_i‖. Where the ridge stays, as near Pareto-stationary points, where x G is
        shorter than some 1e-4 of that sum, to its root, 1e-5.
    """
    power = 1 / alpha
    norms = np.sqrt(_diagonal(gram).clip(min=0))
    absent = norms == 0
    norms = np.where(absent, 1.0, norms)
    cosines = gram / norms[:, :, None] / norms[:, None, :]
    y = norms ** ((1 - alpha) / (1 + alpha))  # the solution for orthogonal task gradients
    everywhere = np.ones(len(gram), dtype=bool)

    _diagonal(cosines)[:] = 1 + RIDGE
    y = _newton(cosines, norms, power, y, everywhere, max_iters)
    _diagonal(cosines)[:] = 1
    little: Flags = np.logical_and.reduce(RIDGE * y < 0.01 * _shares(norms, y, power), axis=1)
    y = _newton(cosines, norms, power, y, little, max_iters)
    return np.where(absent, 0.0, y / norms)


def _shares(norms: Array, y: Array, power: float) -> Array:
    """Not a product of powers: they may leave the range of numbers where their product does not."""
    found: Array = (norms / y) ** power / norms
    return found


def _newton(cosines: Array, norms: Array, power: float, y: Array, problems: Flags, max_iters: int) -> Array:
    """y with Ĝ y = (norms/y)^power/norms for the flagged problems; the others stay as they are."""
    magnitudes = np.abs(cosines)
    shares = _shares(norms, y, power)
    residual = _times(cosines, y) - shares
    for _ in range(max_iters):
        error = np.abs(residual) > BACKWARD_ERROR * (_times(magnitudes, y) + shares)
        unsolved = problems & error.any(axis=1)
        if not unsolved.any():
            break
        hessian = cosines.copy()
        _diagonal(hessian)[:] += power * shares / y
        step = -np.linalg.solve(hessian, residual[:, :, None])[:, :, 0]
        slope = (residual * step).sum(axis=1)
        length = np.where(unsolved, 0.95 / np.maximum((-step / y).max(axis=1), 0.95), 0.0)
        while True:
            trial = np.maximum(y + length[:, None] * step, SMALLEST)
            shares = _shares(norms, trial, power)
            residual = _times(cosines, trial) - shares
            # The slope along the step grows, from below zero; well past its zero the step is too long.
            too_long = unsolved & ((residual * step).sum(axis=1) > -0.5 * slope) & (length > 1e-6)
            if not too_long.any():
                break
            length = np.where(too_long, length / 2, length)
        y = trial
    return y


def _diagonal(matrices: Array) -> Array:
    """The diagonals of ``[S, T, T]`` as a view that can be written to."""
    view: Array = np.einsum("stt->st", matrices)
    return view


def _times(matrices: Array, vectors: Array) -> Array:
    product: Array = np.matmul(matrices, vectors[:, :, None])[:, :, 0]
    return product
