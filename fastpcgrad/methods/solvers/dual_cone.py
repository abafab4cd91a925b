"""Projection onto the dual cone of the task gradients: the quadratic program of UPGrad and DualProj.

The nearest vector to uᵀJ that conflicts with no task gradient is vᵀJ, where v minimises vᵀGv subject to v ≥ u. That is
a non-negative least squares problem in v − u: once the set P of tasks with v_t > u_t is known, v is the solution of a
linear system. Two methods look for P. Block principal pivoting lets all tasks that are on the wrong side change sides
at once; it takes few rounds, but may cycle. What it leaves unsolved goes to Lawson and Hanson's active set method: one
task changes sides at a time and the objective falls with each change of P, so it ends; a task enters only if its
gradient has a part outside the span of those in P, so a singular G is no obstacle.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..._ops import to_device

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

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
    tasks = gram.shape[-1]
    grams = gram.detach().cpu().numpy().reshape(-1, tasks, tasks)
    traces = grams.trace(axis1=1, axis2=2)[:, None]
    finite = np.isfinite(grams.sum(axis=(1, 2)))
    counts = finite[:, None] & (traces > norm_eps)
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
    matrices = np.repeat(unit, len(lower), axis=0)
    values, found = _block_pivoting(matrices, bound)
    if not found.all():
        values[~found] = _ActiveSets(matrices[~found], bound[~found]).solve()
    values = values.reshape(count, len(lower), tasks) / norms[:, None, :]
    return np.maximum(values, lower)


def _rounding(values: Array) -> Array:
    """How far from zero an entry of K y may be by rounding alone: ``[B, 1]``."""
    return 8 * _EPS * np.abs(values).sum(axis=1, keepdims=True)


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


class _ActiveSets:
    """B problems with unit-diagonal matrices K ``[B, T, T]`` and bounds ``[B, T]``, solved in step with each other."""

    def __init__(self, matrices: Array, bound: Array) -> None:
        self._result = bound.copy()
        self._open = np.arange(len(bound))
        self._matrices, self._bound, self._values = matrices, bound, bound.copy()
        self._inside: Mask = np.zeros(bound.shape, dtype=bool)
        # K swept on P: −K_PP⁻¹ within P, K_jP K_PP⁻¹ beside it, the Schur complement of K_PP outside.
        self._swept = matrices.copy()

    def solve(self) -> Array:
        """The minimisers, ``[B, T]``."""
        most = 16 * self._bound.shape[1] + 32  # three times T is much already; rounding must not make it endless
        for _ in range(most):
            if not len(self._open):
                break
            self._step()
        self._result[self._open] = self._values
        return self._result

    def _step(self) -> None:
        """Each problem goes to the minimum over its P, or to where a task leaves P; one task changes sides."""
        values, inside, rows = self._values, self._inside, np.arange(len(self._open))
        gradient = _apply(self._matrices, values)
        # Within P the step to the minimum; beside it what that step takes off the gradient.
        move = _apply(self._swept, gradient * inside)
        room = values - self._bound
        blocking = inside & (room + move < 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(blocking, room / -move, 1.0)
        leaving = reach.argmin(axis=1)
        blocked = blocking[rows, leaving]
        values += reach[rows, leaving][:, None] * (move * inside)

        independent = np.einsum("btt->bt", self._swept) > _DEPENDENT
        reduced = np.where(independent & ~inside, gradient - move + _rounding(values), 0.0)
        entering = reduced.argmin(axis=1)
        changes = blocked | (reduced[rows, entering] < 0)
        if not changes.all():
            self._close(changes)
            rows, blocked = rows[: len(self._open)], blocked[changes]
            leaving, entering = leaving[changes], entering[changes]
        task = np.where(blocked, leaving, entering)
        self._values[rows[blocked], leaving[blocked]] = self._bound[rows[blocked], leaving[blocked]]
        self._inside[rows, task] = ~blocked
        self._sweep(rows[~blocked], task[~blocked])
        self._sweep_anew(rows[blocked])

    def _close(self, changes: Mask) -> None:
        """Put the problems that are solved aside."""
        self._result[self._open[~changes]] = self._values[~changes]
        self._open = self._open[changes]
        self._matrices, self._swept = self._matrices[changes], self._swept[changes]
        self._bound, self._values, self._inside = self._bound[changes], self._values[changes], self._inside[changes]

    def _sweep(self, rows: Places, task: Places) -> None:
        """The symmetric sweep on one task of each of these problems, into P."""
        place, swept = np.arange(len(rows)), self._swept[rows]
        column = swept[place, task]
        pivot = column[place, task]
        # With this entry one subtraction serves row and column of the task too, which become column / pivot.
        column[place, task] = pivot - 1
        swept -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        swept[place, task, task] = -1 / pivot
        self._swept[rows] = swept

    def _sweep_anew(self, rows: Places) -> None:
        """On all of P. To sweep a task out would leave behind what its small pivot has made large, and its rounding."""
        self._swept[rows] = self._matrices[rows]
        for task in range(self._inside.shape[1]):
            some = rows[self._inside[rows, task]]
            self._sweep(some, np.full_like(some, task))
