"""Projection onto the dual cone of the task gradients: the quadratic program of UPGrad and DualProj.

The nearest vector to uᵀJ that conflicts with no task gradient is vᵀJ, where v minimises vᵀGv subject to v ≥ u. That is
a non-negative least squares problem in v − u: once the set P of tasks with v_t > u_t is known, v is the solution of a
linear system. Two methods look for P. Block principal pivoting lets all tasks that are on the wrong side change sides
at once; it takes few rounds, but may cycle. What it leaves unsolved goes to Lawson and Hanson's active set method: one
task changes sides at a time and the objective falls with each change of P, so it ends; a task enters only if its
gradient has a part outside the span of those in P, so a singular G is no obstacle.

Up to ``LARGE`` tasks each change of P costs a sweep of all of K, compiled or here, here of all problems in step. Above,
a problem after the other, block pivoting factors K_PP in every round, by LAPACK, and needs no T×T array but K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..._ops import to_device
from .problems import on_host

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LARGE = 128
"""Tasks above which the problems are solved here, one by one, also where there is a compiled library."""

_EPS = float(np.finfo(np.float64).eps)
# Squared distance of a unit gradient from the span of those in P, below which it is rounding.
_DEPENDENT = 64 * _EPS
_BLOCK_ROUNDS = 16  # most problems need two to six
_RESIDUAL = 1e-12  # of what block pivoting found, relative to Σ |u_t| ‖g_t‖


def project(gram: Tensor, lower: Tensor, norm_eps: float, reg_eps: float) -> Tensor:
    """argmin of vᵀG'v subject to v ≥ u, for each u, with G' = G / tr G + reg_eps I.

    Args:
        gram: ``[T, T]`` or ``[S, T, T]`` float64.
        lower: the vectors u, ``[R, T]`` float64 on the CPU, finite.
        norm_eps: where tr G is not above it, G counts as zero and v = u.
        reg_eps: added to the diagonal.
    Returns:
        ``[R, T]`` or ``[S, R, T]`` float64 on the device of ``gram``; NaN for a problem whose G is not finite.
    Numerics: float64, here in NumPy on the CPU: G is copied to the host. csrc/solvers/dual_cone.h does the same where a
        compiled library is, on the device of G, see ``_compiled.CompiledMethod``. With G' scaled to a unit diagonal,
        the conditions v ≥ u, G'v ≥ 0 and (v − u) · G'v = 0 hold to about 1e-13 of the largest |u_t| or |v_t|. Only with
        reg_eps = 0 a task gradient nearer than about 1e-7 of its norm to the span of others counts as dependent on
        them, and its condition then holds to about 1e-7.
    Source: Lawson and Hanson 1974, Solving Least Squares Problems, ch. 23; Portugal, Júdice and Vicente 1994, A
        comparison of block pivoting and interior-point algorithms for linear least squares problems with nonnegative
        variables.
    """
    grams, finite = on_host(gram)
    traces = grams.trace(axis1=1, axis2=2)[:, None]
    counts = traces > norm_eps
    if not counts.all():
        grams, traces = np.where(counts[:, :, None], grams, 0.0), np.where(counts, traces, 0.0)
    values = _solve(grams, reg_eps * traces, lower.numpy())
    if not finite.all():
        values[~finite] = np.nan
    return to_device(torch.from_numpy(values.reshape(*gram.shape[:-2], *lower.shape)), gram.device)


def _solve(grams: Array, added: Array, lower: Array) -> Array:
    """v ``[S, R, T]`` for G ``[S, T, T]``, what is added to their diagonals ``[S, 1]``, and u ``[R, T]``."""
    count, tasks = len(grams), grams.shape[-1]
    norms = np.sqrt(grams.diagonal(axis1=1, axis2=2) + added)
    is_zero = norms == 0
    norms[is_zero] = 1.0
    unit = grams / (norms[:, :, None] * norms[:, None, :])
    np.einsum("stt->st", unit)[...] = ~is_zero
    bound = (lower * norms[:, None, :]).reshape(-1, tasks)
    if tasks > LARGE:
        each = zip(np.arange(count).repeat(len(lower)), bound, strict=True)
        values = np.stack([_solve_alone(unit[problem], own) for problem, own in each])
        return np.maximum(values.reshape(count, len(lower), tasks) / norms[:, None, :], lower)
    matrices = np.repeat(unit, len(lower), axis=0)
    values, found = _block_pivoting(matrices, bound)
    if not found.all():
        rest = zip(matrices[~found], bound[~found], strict=True)
        values[~found] = np.stack([_activate(matrix, own) for matrix, own in rest])
    values = values.reshape(count, len(lower), tasks) / norms[:, None, :]
    return np.maximum(values, lower)


def _solve_alone(matrix: Array, bound: Array) -> Array:
    """The minimiser ``[T]`` for one K ``[T, T]`` and one bound ``[T]``."""
    values, inside = bound, np.zeros(len(bound), dtype=bool)
    for _ in range(_BLOCK_ROUNDS):
        gradient = matrix @ values
        wrong = np.where(inside, values < bound, gradient < -_rounding(values))
        if not wrong.any():
            if np.abs(gradient * inside).max() <= _RESIDUAL * np.abs(bound).sum():
                return values
            break
        inside = inside ^ wrong
        places = inside.nonzero()[0]
        factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix[np.ix_(places, places)]))
        if info:  # K_PP is all but singular
            break
        values = np.where(inside, 0.0, bound)
        held = torch.from_numpy(-(matrix[places] @ values))
        values[places] = torch.cholesky_solve(held[:, None], factor)[:, 0].numpy()
    return _activate(matrix, bound)


def _rounding(values: Array) -> Array:
    """How far from zero an entry of K y may be by rounding alone: ``[..., 1]``."""
    return 8 * _EPS * np.abs(values).sum(axis=-1, keepdims=True)


def _block_pivoting(matrices: Array, bound: Array) -> tuple[Array, Mask]:
    """The minimisers ``[B, T]`` for unit-diagonal K ``[B, T, T]`` and bounds ``[B, T]``, and which were found."""
    result, found = bound.copy(), np.zeros(len(bound), dtype=bool)
    scale = np.abs(bound).sum(axis=1)
    identity = np.eye(bound.shape[1])
    remaining, values, inside = np.arange(len(bound)), bound, np.zeros(bound.shape, dtype=bool)
    for _ in range(_BLOCK_ROUNDS):
        gradient = _apply(matrices, values)
        wrong = np.where(inside, values < bound, gradient < -_rounding(values))
        todo = wrong.any(axis=1)
        if not todo.all():
            done = ~todo
            # A large residual means that K_PP is all but singular, which the other method knows how to handle.
            residual = np.abs(gradient[done] * inside[done]).max(axis=1)
            found[remaining[done]] = residual <= _RESIDUAL * scale[remaining[done]]
            result[remaining[done]] = values[done]
            if not todo.any():
                break
            remaining, matrices, bound = remaining[todo], matrices[todo], bound[todo]
            inside, wrong = inside[todo], wrong[todo]
        inside = inside ^ wrong
        fixed = np.where(inside, 0.0, bound)
        systems = np.where(inside[:, :, None] & inside[:, None, :], matrices, identity)
        try:
            values = np.linalg.solve(systems, np.where(inside, -_apply(matrices, fixed), bound)[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:  # a singular K_PP
            break
    return result, found


def _apply(matrices: Array, values: Array) -> Array:
    product: Array = np.matmul(matrices, values[:, :, None])[:, :, 0]
    return product


def _activate(matrix: Array, bound: Array) -> Array:
    """The minimiser ``[T]`` for one K ``[T, T]`` and one bound ``[T]``; one task at a time."""
    values, inside = bound.copy(), np.zeros(len(bound), dtype=bool)
    places: list[int] = []  # P, in the order in which they came: so no pivot of K_PP shrinks when a task leaves
    for _ in range(16 * len(bound) + 32):  # three times T is much already; rounding must not make it endless
        gradient = matrix @ values
        factor = np.linalg.cholesky(matrix[np.ix_(places, places)])
        # Of the factor of K that of P makes the rows of all other tasks, too: L⁻¹ K_P, and L⁻¹ of the gradient.
        rows = _forward(factor, np.column_stack([matrix[places], gradient[places]]))
        rows, whitened = rows[:, :-1], rows[:, -1]
        move = np.zeros_like(values)
        move[places] = -np.linalg.solve(factor.T, whitened)
        room = values - bound
        blocking = inside & (room + move < 0)
        reach = np.where(blocking, room, 1.0) / np.where(blocking, -move, 1.0)
        leaving = int(reach.argmin())
        values += reach[leaving] * move
        if blocking[leaving]:
            values[leaving] = bound[leaving]
            inside[leaving] = False
            places.remove(leaving)
            continue
        pivots = matrix.diagonal() - (rows * rows).sum(axis=0)
        reduced = gradient - whitened @ rows + _rounding(values)
        reduced = np.where(~inside & (pivots > _DEPENDENT), reduced, 0.0)
        entering = int(reduced.argmin())
        if not reduced[entering] < 0:
            break
        inside[entering] = True
        places.append(entering)
    return values


def _forward(factor: npt.NDArray[Any], columns: Array) -> Array:
    """L⁻¹ of the columns."""
    solved = torch.linalg.solve_triangular(torch.from_numpy(factor), torch.from_numpy(columns), upper=False)
    found: Array = solved.numpy()
    return found
