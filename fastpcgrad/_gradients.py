"""A gradient as rows hold it: which dtype autograd gives it, dense, and real where it is complex."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """What autograd makes a tensor's gradient of: ``grad_dtype`` where that is set, else its own dtype."""
    chosen: torch.dtype | None = getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None
    return chosen or parameter.dtype


def gradient_nbytes(parameter: Tensor) -> int:
    """Bytes of its gradient."""
    return parameter.numel() * gradient_dtype(parameter).itemsize


def dense(grad: Tensor) -> Tensor:
    """Strided and outside of any graph (``create_graph=True`` gives gradients with a graph of their own)."""
    grad = grad.detach() if grad.requires_grad else grad
    return grad if grad.layout == torch.strided else grad.to_dense()


def added(grad: Tensor, more: Tensor) -> Tensor:
    """The sum of two gradients, in the memory of a dense one, as autograd adds to ``.grad``."""
    return grad.add_(more) if grad.layout == torch.strided else more.add_(grad)


@overload
def as_real(tensor: Tensor) -> Tensor: ...


@overload
def as_real(tensor: None) -> None: ...


def as_real(tensor: Tensor | None) -> Tensor | None:
    """A complex tensor as its real and imaginary parts ``[..., 2]``, in the same memory where that can be.

    The products of two such rows are the real parts of complex ones, by which the gradients of real losses conflict.
    """
    if tensor is None or not tensor.is_complex():
        return tensor
    return torch.view_as_real(dense(tensor).resolve_conj())
