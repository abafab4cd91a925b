"""Every ``torch.ops.fastpcgrad`` schema, its fake and its autograd formula. No maths of the algorithms.

Backends register their kernels on ``LIBRARY``; ``functional`` validates and calls the ops. ``grads`` is J
``[T, N]``; ``segments`` is None or int64 offsets ``[S + 1]`` on the same device, which cut the N columns into S
ranges, each with a Gram matrix, weights or coefficients of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set
from torch._C._autograd import _profiler_enabled

LIBRARY = torch.library.Library("fastpcgrad", "DEF")

_SOLVE = "Tensor order, bool self_projection, float eps, float min_squared_norm"

SCHEMAS: dict[str, str] = {
    "gram": "(Tensor grads, Tensor? segments=None) -> Tensor",
    "pcgrad_coefficients": f"(Tensor gram, {_SOLVE}) -> Tensor",
    "combine": "(Tensor grads, Tensor weights, Tensor? segments=None) -> Tensor",
    "combine_out": "(Tensor grads, Tensor weights, Tensor? segments, Tensor(a!) out) -> ()",
    "mix_": "(Tensor(a!) grads, Tensor coefficients, Tensor? segments=None) -> ()",
    "pcgrad": f"(Tensor grads, {_SOLVE}, float scale, Tensor? segments=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "pcgrad_out": (
        f"(Tensor grads, {_SOLVE}, float scale, Tensor? segments, Tensor(a!) out) -> (Tensor, Tensor, Tensor)"
    ),
    "pcgrad_": f"(Tensor(a!) grads, {_SOLVE}, Tensor? segments=None) -> (Tensor, Tensor)",
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)

KERNELS: dict[str, Callable[..., Any]] = {}
"""The Python body of each op, by its name; and those that are no ops, for no schema can hold what they take:
``gram_blocks``, ``combine_blocks`` and ``pcgrad_blocks`` on ``Blocks``, ``sign_sums`` and ``trimmed_mean`` on single
rows, ``method_weights`` and ``gradvac`` on G. Those of ``pcgrad`` and ``pcgrad_`` leave out G, C and w, which the ops
return: nobody who calls them here wants them."""


class Figures(NamedTuple):
    """What a surgery leaves besides the merged gradient, float64. T counts the tasks that were there.

    Attributes:
        gram: G, ``[T, T]``.
        weights: w, ``[T]``, or ``[S, T]`` where S problems were solved.
        coefficients: C, ``[T, T]`` or ``[S, T, T]``, where the method has them.
        segment_grams: ``[S, T, T]`` where S problems were solved.
    """

    gram: Tensor
    weights: Tensor
    coefficients: Tensor | None = None
    segment_grams: Tensor | None = None


Later = Callable[[], Figures]
"""Gives the figures when they are read: for a small model the tensors themselves are a cost."""


class Blocks(NamedTuple):
    """J, T rows in blocks of columns, one a parameter, each row of a block in memory of its own.

    Attributes:
        tensors: for each task its row of each block, dense, in any order of dimensions, the same in all tasks; None:
            all zero.
        pointers: where those begin; 0 for None.
        widths: the columns of each block.
    """

    tensors: Sequence[Sequence[Tensor | None]]
    pointers: Sequence[Sequence[int]]
    widths: array[int]
    dtype: torch.dtype
    device: torch.device


_UNWATCHED = reduce(
    or_,
    (
        DispatchKeySet(key).raw_repr()
        for key in (
            *(DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.AutocastCPU),
            *(DispatchKey.CUDA, DispatchKey.AutogradCUDA, DispatchKey.AutocastCUDA),
            *(DispatchKey.ADInplaceOrView, DispatchKey.BackendSelect),
        )
    ),
)
"""The dispatch keys of plain tensors outside of every mode."""

_NO_TENSORS = {type(None), bool, float}


def is_watched(arguments: Sequence[object]) -> bool:
    """Whether a call concerns more than the kernel: autograd, a transform, a mode, a tracer, the profiler.

    Or the dispatcher itself, where a tensor is no plain one on a CPU or a CUDA device.
    """
    keys = _dispatch_tls_local_include_set().raw_repr()
    differentiated = torch.is_grad_enabled()
    for argument in arguments:
        if type(argument) is Tensor:
            if differentiated and argument.requires_grad:
                return True
            keys |= _dispatch_keys(argument).raw_repr()
        elif type(argument) not in _NO_TENSORS:
            return True
    return bool(keys & ~_UNWATCHED) or _profiler_enabled()


def _entry(name: str) -> Callable[..., Any]:
    """Calls an op, or where nobody watches its kernel itself.

    The dispatcher takes as long as the rest of a small call: a second Python function where there is a derivative, and
    every result is wrapped anew.
    """
    op = getattr(torch.ops.fastpcgrad, name).default

    def call(*arguments: object) -> Any:
        if torch.compiler.is_compiling() or is_watched(arguments):
            return op(*arguments)
        return KERNELS[name](*arguments)

    return call


gram = _entry("gram")
pcgrad_coefficients = _entry("pcgrad_coefficients")
combine = _entry("combine")
pcgrad = _entry("pcgrad")
pcgrad_ = _entry("pcgrad_")
# Without a derivative and a result the dispatcher costs no more than to look whether it is needed.
combine_out = torch.ops.fastpcgrad.combine_out.default
mix_ = torch.ops.fastpcgrad.mix_.default


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their memory, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the host's memory on ``device``, without a wait for what a GPU has queued.

    The driver has copied pageable memory when the call returns. A captured graph would read it at each replay, long
    after it is gone: there torch waits, which the capture refuses.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.to(device, non_blocking=not torch.cuda.is_current_stream_capturing())


def new_gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    """An uninitialised G for ``grads``: float64 ``[T, T]``, or ``[S, T, T]``."""
    tasks = grads.shape[0]
    shape = (tasks, tasks) if segments is None else (segments.shape[0] - 1, tasks, tasks)
    return grads.new_empty(shape, dtype=torch.float64)


def new_figures(grads: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An uninitialised G, C and w for ``grads``."""
    gram = new_gram(grads, segments)
    return gram, torch.empty_like(gram), gram.new_empty(gram.shape[:-1])


@torch.library.register_fake("fastpcgrad::gram", lib=LIBRARY)
def _(grads: Tensor, segments: Tensor | None = None) -> Tensor:
    return new_gram(grads, segments)


@torch.library.register_fake("fastpcgrad::pcgrad_coefficients", lib=LIBRARY)
def _(gram: Tensor, order: Tensor, self_projection: bool, eps: float, min_squared_norm: float) -> Tensor:
    return torch.empty_like(gram, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastpcgrad::combine", lib=LIBRARY)
def _(grads: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    return grads.new_empty(grads.shape[1])


@torch.library.register_fake("fastpcgrad::combine_out", lib=LIBRARY)
def _(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastpcgrad::mix_", lib=LIBRARY)
def _(grads: Tensor, coefficients: Tensor, segments: Tensor | None = None) -> None:
    return None


@torch.library.register_fake("fastpcgrad::pcgrad", lib=LIBRARY)
def _(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    scale: float,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return grads.new_empty(grads.shape[1]), *new_figures(grads, segments)


@torch.library.register_fake("fastpcgrad::pcgrad_out", lib=LIBRARY)
def _(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    scale: float,
    segments: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return new_figures(grads, segments)


@torch.library.register_fake("fastpcgrad::pcgrad_", lib=LIBRARY)
def _(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return new_figures(grads, segments)[:2]


# The backward formulas are plain differentiable torch, so that second derivatives exist too.


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _owner_of_each_column(segments: Tensor, width: int) -> Tensor:
    return torch.repeat_interleave(
        torch.arange(segments.shape[0] - 1, device=segments.device), segments.diff(), output_size=width
    )


def _gram_backward(ctx: Any, grad_gram: Tensor) -> tuple[Tensor, None]:
    """dJ = (dG + dGᵀ) J, for each segment."""
    grads, segments = ctx.saved_tensors
    symmetric = (grad_gram + grad_gram.mT).to(grads.dtype)
    if segments is None:
        return symmetric @ grads, None
    pieces = grads.split(segments.diff().tolist(), dim=1)
    return torch.cat([s @ piece for s, piece in zip(symmetric, pieces, strict=True)], dim=1), None


def _combine_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
    """dJ = w ⊗ dg and dw = J dg, for each segment."""
    grads, weights, segments = ctx.saved_tensors
    scaled = weights.to(grads.dtype)
    if segments is None:
        return scaled[:, None] * grad_out, grads.to(weights.dtype) @ grad_out.to(weights.dtype), None
    owner = _owner_of_each_column(segments, grads.shape[1])
    products = grads.to(weights.dtype) * grad_out.to(weights.dtype)
    grad_weights = products.new_zeros(weights.shape[::-1]).index_add(1, owner, products).mT
    return scaled.mT[:, owner] * grad_out, grad_weights, None


def _no_derivative(ctx: Any, *grad_outputs: Tensor) -> None:
    raise RuntimeError(
        "fastpcgrad: PCGrad's projections have no derivative here; differentiate through gram and combine, "
        "with the coefficients detached"
    )


torch.library.register_autograd("fastpcgrad::gram", _gram_backward, setup_context=_save_inputs, lib=LIBRARY)
torch.library.register_autograd("fastpcgrad::combine", _combine_backward, setup_context=_save_inputs, lib=LIBRARY)
for _name in ("pcgrad_coefficients", "pcgrad"):
    torch.library.register_autograd(f"fastpcgrad::{_name}", _no_derivative, lib=LIBRARY)
