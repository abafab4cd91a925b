"""Typed functions on packed task gradients J ``[T, N]``; what they refuse is in ``_checks``.

Everything that needs N runs in two streaming passes (``gram`` and ``combine`` or ``mix_``); what lies between
them runs on the T×T Gram matrix. The kernels check nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Literal

import torch
from torch import Tensor

from . import _derivatives, variants
from ._checks import ROW_DTYPES as ROW_DTYPES
from ._checks import (
    check_gram,
    check_guards,
    check_matrix,
    check_offsets,
    check_order,
    check_out_kind,
    check_rows,
    check_segments_kind,
    check_separate_rows,
    is_readable,
)
from ._modes import is_batched
from ._ops import to_device
from .backends import kernels
from .variants import Generator

Segments = Tensor | Sequence[int]


def gram(grads: Tensor, segments: Segments | None = None) -> Tensor:
    """Gram matrix of the task gradients: G = J Jᵀ, in one pass over J. Differentiable, in every mode and transform.

    Args:
        grads: ``[T, N]`` fp16/bf16/fp32/fp64, rows contiguous, any row stride; CPU or CUDA.
        segments: offsets ``[S + 1]`` that cut the columns into S ranges: 0 first, N last, non-decreasing.
    Returns:
        ``[T, T]`` float64 on the device of ``grads``; ``[S, T, T]`` with segments.
    Raises:
        TypeError: ``grads`` is no tensor or of another dtype; offsets that are no integers.
        ValueError: rank, layout or offsets are wrong; the message shows what was found.
    Numerics: products of fp16/bf16/fp32 rows are summed in fp32 lanes that go to float64 at least every 1024
        columns; rows whose squares would leave fp32's range are summed in float64 from the start. The same input
        gives the same bits, whatever the number of threads. NaN and inf stay in the entries of their row. Under the
        transforms of ``torch.func`` and in forward mode torch computes it in float64.
    Oracle: ``reference.gram``.
    Example:
        >>> J = torch.tensor([[3.0, 4.0], [-4.0, 3.0]])
        >>> fastpcgrad.gram(J)
        tensor([[25.,  0.],
                [ 0., 25.]], dtype=torch.float64)
    """
    check_rows(grads)
    return kernels.gram(grads, _offsets(segments, grads))


def pcgrad_coefficients(
    gram: Tensor,
    order: Tensor,
    self_projection: bool = False,
    eps: float = 0.0,
    *,
    min_squared_norm: float = 0.0,
) -> Tensor:
    """Coefficients of PCGrad's projections: the projected row i is Σ_k C_ik g_k.

    Args:
        gram: G, ``[T, T]`` or ``[S, T, T]`` (S independent problems), float64.
        order: ``[T, T]`` or ``[S, T, T]`` int64, same device: row i holds the order in which the tasks j are
            projected away from row i, a permutation of 0..T-1. On the CPU a row that is none raises; on a GPU
            that check would stop the stream, and an index out of range gives NaN coefficients instead.
        self_projection: whether j = i takes part, as some implementations have it.
        eps: added to ``G_jj`` in the denominator.
        min_squared_norm: a task takes part only where ``G_jj`` exceeds this.
    Returns:
        C, float64, of the shape of ``gram``.
    Raises:
        TypeError: dtype mismatch.
        ValueError: shape or device mismatch, an order that is no permutation, negative eps.
    Numerics: float64. A projection whose dot product or norm is not finite is left out, so that NaN in one task
        does not spread to the others' tests.
    Source: Yu et al. 2020, arXiv:2001.06782, Alg. 1. Oracle: ``reference.coefficients``.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> fastpcgrad.pcgrad_coefficients(G, torch.tensor([[0, 1], [0, 1]]))
        tensor([[1.0000, 0.5000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    check_gram(gram)
    check_guards(eps, min_squared_norm)
    check_order(order, gram.shape[-1], gram.shape[0] if gram.dim() == 3 else None, gram.device)
    return kernels.pcgrad_coefficients(gram, order, self_projection, float(eps), float(min_squared_norm))


def combine(grads: Tensor, weights: Tensor, out: Tensor | None = None, *, segments: Segments | None = None) -> Tensor:
    """Weighted sum of the task gradients: w J, in one pass over J. Differentiable where ``out`` is None.

    Args:
        grads: ``[T, N]`` fp16/bf16/fp32/fp64, rows contiguous, any row stride; CPU or CUDA.
        weights: ``[T]`` float64, or ``[S, T]`` with segments; same device.
        out: ``[N]``, dtype and device of ``grads``, contiguous; may be a row of ``grads``.
        segments: offsets ``[S + 1]``, see ``gram``.
    Returns:
        ``[N]`` in the dtype of ``grads``: ``out`` if given.
    Raises:
        TypeError: wrong dtype.
        ValueError: rank, layout, device or length mismatch, or ``out`` shares memory with weights, segments or rows
            that it is not; the message shows what was found.
        RuntimeError: ``out`` is given and a tensor requires grad or has a tangent.
    Numerics: accumulates in fp32 (fp64 for fp64 rows, and where a weight leaves fp32's range). A zero weight
        does not hide NaN or inf. Transforms and forward mode: see ``gram``.
    Oracle: ``reference.combine``.
    Example:
        >>> J = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
        >>> fastpcgrad.combine(J, torch.tensor([1.0, -1.0], dtype=torch.float64))
        tensor([-2., -3.])
    """
    check_rows(grads)
    offsets = _offsets(segments, grads)
    check_matrix("weights", weights, grads, _problems(offsets), (grads.shape[0],))
    if out is None:
        return kernels.combine(grads, weights, offsets)
    _check_out("combine", out, grads, weights)
    kernels.combine_out(grads, weights, offsets, out)
    return out


def mix_(grads: Tensor, coefficients: Tensor, *, segments: Segments | None = None) -> Tensor:
    """Replace each task gradient by its combination of all of them, in place: J ← C J.

    Args:
        grads: ``[T, N]`` fp16/bf16/fp32/fp64, rows contiguous, any row stride; CPU or CUDA. Overwritten.
        coefficients: C, ``[T, T]`` float64, or ``[S, T, T]`` with segments; same device.
        segments: offsets ``[S + 1]``, see ``gram``.
    Returns:
        ``grads`` itself.
    Raises:
        TypeError: wrong dtype.
        ValueError: rank, layout, device or length mismatch, overlapping rows, or coefficients or segments in the memory
            of ``grads``; the message shows what was found.
        RuntimeError: a tensor requires grad or has a tangent.
    Numerics: accumulates in fp32 (fp64 for fp64 rows, and where a coefficient leaves fp32's range).
    Source: Yu et al. 2020, arXiv:2001.06782, Alg. 1. Oracle: ``reference.mix``.
    Example:
        >>> J = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
        >>> fastpcgrad.mix_(J, torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64))
        tensor([[ 4.,  7.],
                [ 6., 10.]])
    """
    check_rows(grads)
    _check_writable("grads", grads)
    check_separate_rows(grads)
    offsets = _offsets(segments, grads)
    check_matrix("coefficients", coefficients, grads, _problems(offsets), (grads.shape[0], grads.shape[0]))
    if coefficients.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("mix_ has no derivative: coefficients requires grad; use torch.no_grad()")
    kernels.mix_(grads, coefficients, offsets)
    return grads


def pcgrad(
    grads: Tensor,
    *,
    variant: str = "paper",
    reduction: Literal["sum", "mean", "none"] | None = None,
    order: Tensor | None = None,
    generator: Generator | None = None,
    segments: Segments | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """PCGrad on packed task gradients: project each row away from those it conflicts with, then merge.

    Args:
        grads: ``[T, N]`` fp16/bf16/fp32/fp64, rows contiguous, any row stride; CPU or CUDA. Not changed.
        variant: which published PCGrad, see ``methods.PCGrad``; but for ``cagrad``, whose guard is a method's alone.
        reduction: ``sum`` or ``mean`` of the projected rows, or ``none``: the projected rows themselves.
            None: the variant's own.
        order: ``[T, T]`` int64 (``[S, T, T]`` with segments), see ``pcgrad_coefficients``. None: drawn as the
            variant draws it.
        generator: to draw from, see ``methods.PCGrad``. None: the global generator of the variant's original.
        segments: offsets ``[S + 1]``, see ``gram``: each range of columns is a problem of its own.
        out: ``[N]`` for the merged gradient, dtype and device of ``grads``, contiguous; may be a row of ``grads``.
            Memory that was written before costs no page faults, which for two rows take a quarter of the time.
    Returns:
        The merged gradient ``[N]``, ``out`` if given, or the projected rows ``[T, N]`` for ``reduction="none"``.
    Raises:
        TypeError: wrong dtype or generator.
        ValueError: unknown variant or one with another guard, unknown reduction; rank, layout, device or length
            mismatch, no permutation; ``out`` without a reduction, or in the memory of rows that it is not, of the order
            or of segments.
        RuntimeError: ``out`` is given and a tensor requires grad or has a tangent; a derivative is asked for: by a
            backward pass, in forward mode or by a transform.
    Numerics: see ``gram`` and ``combine``; results scale with the gradients, from 1e-30 to 1e+18 in fp32.
    Source: Yu et al. 2020, arXiv:2001.06782, Alg. 1. Oracle: ``reference.merge``.
    Example:
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> fastpcgrad.pcgrad(J, reduction="none")
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    check_rows(grads)
    chosen = _variant(variant)
    if reduction not in ("sum", "mean", "none", None):
        raise ValueError(f"reduction must be 'sum', 'mean', 'none' or None; found {reduction!r}")
    if out is not None:
        if reduction == "none":
            raise ValueError("out is for the merged gradient; found reduction='none': pcgrad_ projects rows in place")
        _check_out("pcgrad", out, grads)
    offsets = _offsets(segments, grads)
    order = _order_for(grads, offsets, chosen, order, generator)
    if reduction == "none":
        _derivatives.refuse_derivative("pcgrad", grads)
        rows = grads.detach().clone(memory_format=torch.contiguous_format)
        kernels.pcgrad_(rows, order, *chosen.guards, offsets)
        return _derivatives.without_derivative("pcgrad", rows, grads)
    scale = 1.0 / grads.shape[0] if (reduction or chosen.reduction) == "mean" else 1.0
    if out is not None:
        kernels.pcgrad_out(grads, order, *chosen.guards, scale, offsets, out)
        return out
    merged: Tensor = kernels.pcgrad(grads, order, *chosen.guards, scale, offsets)[0]
    return merged


def pcgrad_(
    grads: Tensor,
    *,
    variant: str = "paper",
    order: Tensor | None = None,
    generator: Generator | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """PCGrad's sequential projections, in place: row i becomes g_i', the projected gradient of task i.

    Args:
        grads: ``[T, N]`` fp16/bf16/fp32/fp64, rows contiguous, any row stride; CPU or CUDA. Overwritten.
        variant, order, generator, segments: see ``pcgrad``.
    Returns:
        ``grads`` itself.
    Raises:
        TypeError: wrong dtype or generator.
        ValueError: unknown variant, rank, layout, device or length mismatch, no permutation, overlapping rows, or an
            order or segments in the memory of ``grads``.
        RuntimeError: ``grads`` requires grad or has a tangent.
    Numerics: see ``gram`` and ``mix_``. Source: Yu et al. 2020, arXiv:2001.06782, Alg. 1.
    Example:
        >>> fastpcgrad.pcgrad_(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    check_rows(grads)
    _check_writable("grads", grads)
    check_separate_rows(grads)
    chosen = _variant(variant)
    offsets = _offsets(segments, grads)
    order = _order_for(grads, offsets, chosen, order, generator)
    kernels.pcgrad_(grads, order, *chosen.guards, offsets)
    return grads


def _variant(name: str) -> variants.Variant:
    """One that the kernels from J to the merged gradient can do; ValueError for others."""
    chosen = variants.get(name)
    if chosen.norm_eps:
        raise ValueError(
            f"variant={name!r} divides by (‖g_j‖ + {chosen.norm_eps})², which is done on the Gram matrix alone: use "
            f"combine(grads, methods.PCGrad({name!r}).weights(gram(grads)))"
        )
    return chosen


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires grad and would be overwritten; detach it or use torch.no_grad()")


def _check_out(name: str, out: Tensor, *read: Tensor) -> None:
    check_out_kind(out, read[0])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, *read)):
        raise RuntimeError(f"{name} with out= has no derivative: a tensor requires grad; use torch.no_grad()")


def _offsets(segments: Segments | None, grads: Tensor) -> Tensor | None:
    """Validated int64 offsets on the device of ``grads``. Offsets that lie on a GPU are taken as they are."""
    if segments is None:
        return None
    if isinstance(segments, Tensor):
        check_segments_kind(segments)
        if not torch.compiler.is_compiling() and is_batched(segments):
            raise ValueError("segments must be the same for all that vmap batches; found batched offsets")
        if not is_readable(segments):
            return to_device(segments, grads.device)
        values = segments.tolist()
    else:
        try:
            values = [index(offset) for offset in segments]
        except TypeError:
            raise TypeError(f"segments must be a tensor or a sequence of integers; found {segments!r}") from None
    check_offsets(values, grads.shape[1])
    return to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), grads.device, constant=True)


def _problems(offsets: Tensor | None) -> int | None:
    return None if offsets is None else offsets.shape[0] - 1


def _order_for(
    grads: Tensor,
    offsets: Tensor | None,
    variant: variants.Variant,
    order: Tensor | None,
    generator: Generator | None,
) -> Tensor:
    tasks, count = grads.shape[0], _problems(offsets)
    if order is not None:
        check_order(order, tasks, count, grads.device)
        return order
    variants.check_generator(generator)
    return kernels.orders(variant, tasks, count, generator, grads.device)
