"""What becomes of derivatives and transforms: ``gram`` and ``combine`` have all, the other ops say that they have none.

Their kernels serve plain calls and reverse mode. In forward mode and under the transforms of ``torch.func`` the two are
computed by torch in float64, which knows how to nest and to batch them; a kernel of ours would hide the tangents, and
torch's ``autograd.Function`` loses those of nested forward modes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._modes import is_watched
from ._ops import LIBRARY, SCHEMAS, checked, op_named, written_by
from ._torch import below_autograd, forward_mode, keys_below_autograd, transforms_active
from .backends.kernels import BODIES

# Plain differentiable torch, so that derivatives of any order exist.


def _gram(grads: Tensor, segments: Tensor | None = None) -> Tensor:
    rows = grads.double()
    if segments is None:
        return rows @ rows.mT
    return torch.stack([piece @ piece.mT for piece in rows.split(segments.diff().tolist(), dim=1)])


def _combine(grads: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    rows = grads.double()
    if segments is None:
        return (weights @ rows).to(grads.dtype)
    return (weights.mT[:, _owner_of_each_column(segments, rows.shape[1])] * rows).sum(dim=0).to(grads.dtype)


def _owner_of_each_column(segments: Tensor, width: int) -> Tensor:
    return torch.repeat_interleave(
        torch.arange(segments.shape[0] - 1, device=segments.device), segments.diff(), output_size=width
    )


def _gram_backward(grad_gram: Tensor, grads: Tensor, segments: Tensor | None = None) -> tuple[Tensor]:
    """dJ = (dG + dGᵀ) J, for each segment."""
    symmetric = (grad_gram + grad_gram.mT).to(grads.dtype)
    if segments is None:
        return (symmetric @ grads,)
    pieces = grads.split(segments.diff().tolist(), dim=1)
    return (torch.cat([s @ piece for s, piece in zip(symmetric, pieces, strict=True)], dim=1),)


def _combine_backward(
    grad_out: Tensor, grads: Tensor, weights: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dJ = w ⊗ dg and dw = J dg, for each segment."""
    scaled = weights.to(grads.dtype)
    if segments is None:
        return scaled[:, None] * grad_out, grads.to(weights.dtype) @ grad_out.to(weights.dtype)
    owner = _owner_of_each_column(segments, grads.shape[1])
    products = grads.to(weights.dtype) * grad_out.to(weights.dtype)
    grad_weights = products.new_zeros(weights.shape[::-1]).index_add(1, owner, products).mT
    return scaled.mT[:, owner] * grad_out, grad_weights


class _Reverse(torch.autograd.Function):
    """An op's kernel with a formula for its derivative."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], formula: Callable[..., Any], *arguments: Any) -> Any:
        ctx.formula = formula
        ctx.save_for_backward(*arguments)
        return kernel(*arguments)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        found = ctx.formula(*grad_outputs, *ctx.saved_tensors)
        return (None, None, *found, *[None] * (len(ctx.saved_tensors) - len(found)))


class _Refused(torch.autograd.Function):
    """An op's kernel; its derivative is an error."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], name: str, *arguments: Any) -> Any:
        ctx.name = name
        return kernel(*arguments)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(_NO_DERIVATIVE.format(ctx.name))


_NO_DERIVATIVE = (
    "fastpcgrad: {0} has no derivative; differentiate through gram and combine (without out=), and detach what {0} is "
    "given"
)


def refuse_derivative(name: str, source: Tensor) -> None:
    """RuntimeError where ``source`` is differentiated in forward mode or by a transform: a detached result is zero."""
    if _has_tangent((source,)) or (_requires_grad((source,)) and transforms_active()):
        raise RuntimeError(_NO_DERIVATIVE.format(name))


def without_derivative(name: str, result: Tensor, source: Tensor) -> Tensor:
    """``result``, made of a detached ``source``; a backward pass through it is an error."""
    if not _requires_grad((source,)):
        return result
    found: Tensor = _Refused.apply(_first, name, result, source)
    return found


def _first(result: Tensor, source: Tensor) -> Tensor:
    return result.view_as(result)


def _below(op: Any, keyset: Any) -> Callable[..., Any]:
    """The op as it is below autograd."""
    if below_autograd is None or keys_below_autograd is None:
        return _kernel_of(op)

    def call(*arguments: Any) -> Any:
        with below_autograd():
            return op.redispatch(keyset & keys_below_autograd, *arguments)

    return call


def _kernel_of(op: Any) -> Callable[..., Any]:
    """The op's kernel itself, where the dispatcher cannot go on to it: refused while others than autograd look."""
    name = op.name().removeprefix("fastpcgrad::")

    def call(*arguments: Any) -> Any:
        with torch.no_grad():
            if torch.compiler.is_compiling() or is_watched(arguments):
                raise NotImplementedError(
                    f"fastpcgrad: with torch {torch.__version__} {name} takes plain tensors alone: call it outside of "
                    "modes, tracers, profilers and torch.compile"
                )
            return checked(name, BODIES[name])(*arguments)

    return call


def _has_tangent(arguments: Sequence[Any]) -> bool:
    """Whether one is differentiated in forward mode at the level that is on, if any is."""
    return forward_mode._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments
    )


def _requires_grad(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _differentiable(name: str, formula: Callable[..., Tensor], backward: Callable[..., Any]) -> None:
    op = op_named(name)

    def differentiated(keyset: Any, *arguments: Any) -> Any:
        if _has_tangent(arguments):
            return formula(*arguments)
        kernel = _below(op, keyset)
        return _Reverse.apply(kernel, backward, *arguments) if _requires_grad(arguments) else kernel(*arguments)

    LIBRARY.impl(name, differentiated, "Autograd", with_keyset=True)
    # The first of the keys that a transform of torch.func turns on: what each of them does is left to torch.
    LIBRARY.impl(name, formula, "FuncTorchDynamicLayerFrontMode")


def _not_differentiable(name: str) -> None:
    op = op_named(name)
    overwrites = written_by(name) is not None

    def refused(keyset: Any, *arguments: Any) -> Any:
        kernel, differentiated = _below(op, keyset), _requires_grad(arguments)
        in_transform = differentiated and transforms_active()
        if in_transform or (differentiated and overwrites) or _has_tangent(arguments):
            raise RuntimeError(_NO_DERIVATIVE.format(name))
        return _Refused.apply(kernel, name, *arguments) if differentiated else kernel(*arguments)

    LIBRARY.impl(name, refused, "Autograd", with_keyset=True)


_differentiable("gram", _gram, _gram_backward)
_differentiable("combine", _combine, _combine_backward)
for _name in SCHEMAS.keys() - {"gram", "combine"}:
    _not_differentiable(_name)
