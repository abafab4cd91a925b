"""What methods share: a batch of problems, checked, with those that are not finite set apart.

A T×T problem takes tens of dependent steps of a few operations each. Iterative solvers are compiled: on a CPU a problem
takes microseconds, on a GPU a warp solves it and nothing waits (``CompiledMethod``). Where there is no compiled library
they are in NumPy, whose calls on T×T arrays cost a fraction of torch's.

Eigenvalues are Jacobi's there too, on a CPU up to T = 16: from there on LAPACK is faster.

What needs no solver runs in NumPy on a CPU, in torch on a GPU: it is written once against what the two modules have in
common, with the module as ``xp``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..._modes import is_fake, refuse_tracers
from ..._ops import to_device
from ...backends import kernels

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]


class CompiledSolver(NamedTuple):
    """A compiled solver and its two parameters, see ``fpg_solver`` in csrc/fastpcgrad.h."""

    name: str
    parameters: tuple[float, float] = (0.0, 0.0)


def compiled(solver: CompiledSolver, gram: Tensor, preference: Tensor | None = None) -> Tensor | None:
    """The solver's answers by a compiled library; None without one. NaN where G is not finite."""
    given = gram.detach() if gram.requires_grad else gram
    answers: Tensor | None = kernels.method_weights(solver.name, given, solver.parameters, preference)
    return answers


def on_host(gram: Tensor) -> tuple[Array, Flags]:
    """G as ``[S, T, T]`` (S = 1 for ``[T, T]``), and which problems ``[S]`` are finite; the others are made zero.

    Raises:
        TypeError, ValueError: see ``check_gram``.
        RuntimeError: no memory behind G, or one that looks on would see nothing of what NumPy does.
    """
    check_gram(gram)
    refuse_tracers(gram)
    if is_fake(gram):
        raise RuntimeError("a G of FakeTensorMode or of the meta device holds no numbers that NumPy could solve for")
    problems: Array = gram.detach().cpu().numpy().reshape(-1, *gram.shape[-2:])
    finite: Flags = np.logical_and.reduce(np.isfinite(problems), axis=(1, 2))
    if not finite.all():
        problems = np.where(finite[:, None, None], problems, 0.0)
    return problems, finite


def from_host(weights: Array, gram: Tensor) -> Tensor:
    """Weights ``[S, T]`` in the shape that belongs to ``gram``, on its device."""
    return to_device(torch.from_numpy(weights.reshape(gram.shape[:-1])), gram.device)


def in_place(gram: Tensor) -> tuple[Any, Any, Any]:
    """Where ``gram`` lies: the module ``xp`` (numpy on a CPU, else torch), G as its array, which problems are finite.

    Returns:
        ``xp``; ``[..., T, T]``, zero where a problem is not finite; ``[...]`` bool.
    Raises:
        TypeError, ValueError: see ``check_gram``.
    """
    check_gram(gram)
    xp = array_module(gram)
    array = xp.asarray(gram.detach())
    finite = xp.isfinite(array).all((-2, -1))
    return xp, xp.where(finite[..., None, None], array, 0.0), finite


def array_module(gram: Tensor) -> Any:
    """numpy for a tensor on a CPU, else torch."""
    return np if gram.is_cpu else torch


def check_gram(gram: Tensor) -> torch.Size:
    """Its shape.

    Raises:
        TypeError: no tensor.
        ValueError: not float64 and ``[T, T]`` or ``[S, T, T]`` with T ≥ 1.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram must be a tensor; found {type(gram).__name__}")
    shape = gram.shape
    if gram.dtype != torch.float64 or len(shape) not in (2, 3) or not shape[-1] == shape[-2] > 0:
        raise ValueError(f"gram must be float64 [T, T] or [S, T, T] with T >= 1; found {gram.dtype} {list(shape)}")
    return shape
