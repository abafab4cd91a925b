"""How all others get at kernels.

Those on packed rows are ops. Where somebody watches (autograd, a transform, a tracer, the profiler) a call goes through
the dispatcher, else to the kernel itself: the dispatcher takes as long as the rest of a small call, a second Python
function where there is a derivative, and every result is wrapped anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _modes, variants
from .._blocks import Blocks, first_of
from .._checks import check_apart, check_out
from .._memory import prefer_huge_pages
from .._ops import LIBRARY, SCHEMAS, Later, beside, checked, op_named, refuse_capture, to_device
from ..variants import Generator, Guards, Variant
from . import cpu, eager, for_tasks, forced, select, select_by, select_for, shapes
from .protocol import BlockFunctions

P = ParamSpec("P")
R = TypeVar("R")


def _op(name: str, kernel: Callable[P, R], unwatched: Callable[P, R] | None = None) -> Callable[P, R]:
    """Let a kernel serve the op of that name.

    Args:
        kernel: its Python body for every device: the backend decides by the tensor's.
        unwatched: what to call where nobody watches; None: the kernel.
    Returns:
        what calls one of them or the op.
    """
    op, own = op_named(name), unwatched or kernel
    is_ordered = "Tensor order" in SCHEMAS[name]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, checked(name, kernel), key)

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _modes.is_watched(arguments):
            together = _with_order(*arguments) if is_ordered else arguments
            result: R = op(*together, **named)
            return result
        return own(*arguments, **named)

    return call


def _with_order(first: Any, order: Any, *others: Any) -> tuple[Any, ...]:
    """The arguments of an op, which may have an order from the host's memory (``orders``): all on one device."""
    return first, beside(order, first), *others


def _mark_written(tensor: Tensor) -> None:
    # Autograd must notice that a tensor which it saved has been overwritten.
    if not tensor.is_inference():
        increment_version(tensor)


def _gram(grads: Tensor, segments: Tensor | None = None) -> Tensor:
    return select_for("gram", grads).gram(grads, segments)


def _pcgrad_coefficients(
    gram: Tensor, order: Tensor, self_projection: bool, eps: float, min_squared_norm: float
) -> Tensor:
    backend = for_tasks(select_by(gram), gram.shape[-1])
    return backend.pcgrad_coefficients(gram, order, Guards(self_projection, eps, min_squared_norm))


def _combine(grads: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    out = prefer_huge_pages(grads.new_empty(grads.shape[1]))
    select_for("combine", grads).combine(grads, weights, segments, out)
    return out


def _combine_out(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    check_out(out, grads)
    check_apart("out", out, weights, segments)
    _mark_written(out)
    select_for("combine", grads).combine(grads, weights, segments, out)


def _mix_(grads: Tensor, coefficients: Tensor, segments: Tensor | None = None) -> None:
    check_apart("grads", grads, coefficients, segments)
    _mark_written(grads)
    select_for("mix_", grads).mix_(grads, coefficients, segments)


def _pcgrad(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    scale: float,
    segments: Tensor | None = None,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    out = prefer_huge_pages(grads.new_empty(grads.shape[1]))
    guards = Guards(self_projection, eps, min_squared_norm)
    return out, *select_for("pcgrad", grads).pcgrad(grads, order, guards, scale, segments, out, figures)


def _pcgrad_out(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    scale: float,
    segments: Tensor | None,
    out: Tensor,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    check_out(out, grads)
    check_apart("out", out, order, segments)
    _mark_written(out)
    guards = Guards(self_projection, eps, min_squared_norm)
    return select_for("pcgrad", grads).pcgrad(grads, order, guards, scale, segments, out, figures)


def _pcgrad_(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    segments: Tensor | None = None,
    figures: bool = True,
) -> tuple[Tensor, ...]:
    check_apart("grads", grads, order, segments)
    _mark_written(grads)
    backend = for_tasks(select_by(grads), grads.shape[0])
    return backend.pcgrad_(grads, order, Guards(self_projection, eps, min_squared_norm), segments, figures)


BODIES: dict[str, Callable[..., Any]] = {
    "gram": _gram,
    "pcgrad_coefficients": _pcgrad_coefficients,
    "combine": _combine,
    "combine_out": _combine_out,
    "mix_": _mix_,
    "pcgrad": _pcgrad,
    "pcgrad_": _pcgrad_,
    "pcgrad_out": _pcgrad_out,
}
"""What serves each op."""

gram = _op("gram", _gram)
pcgrad_coefficients = _op("pcgrad_coefficients", _pcgrad_coefficients)
combine = _op("combine", _combine)
combine_out = _op("combine_out", _combine_out)
mix_ = _op("mix_", _mix_)
# Nobody who calls these by name wants G, C and w, which the ops return.
pcgrad = _op("pcgrad", _pcgrad, partial(_pcgrad, figures=False))
pcgrad_ = _op("pcgrad_", _pcgrad_, partial(_pcgrad_, figures=False))
pcgrad_out = _op("pcgrad_out", _pcgrad_out, partial(_pcgrad_out, figures=False))


# No ops, for no schema can hold what they take: see ``protocol.BlockFunctions``.

_PLAIN = {Tensor, type(None)}


def _has_memory(given: Tensor | None, *besides: Tensor | None) -> bool:
    """Whether what is no op can be given to a library, which gets pointers; else ``shapes`` stands for it.

    Args:
        given: what the work is on.
        besides: what comes with it.
    Raises:
        RuntimeError: under a tracer or a transform of torch.func, which would see nothing of it.
        TypeError: what comes with ``given`` has no memory, and that has.
    """
    if type(given) in _PLAIN and _PLAIN.issuperset(map(type, besides)) and not _modes.is_on():
        return given is None or not given.is_meta
    _modes.refuse_tracers(given)
    if _modes.is_faking() or (given is not None and _modes.is_fake(given)):
        return False
    if any(tensor is not None and _modes.is_fake(tensor) for tensor in besides):
        raise TypeError("a tensor of FakeTensorMode or of the meta device cannot be used with gradients that are none")
    return True


def _for_blocks(blocks: Blocks, *besides: Tensor | None) -> BlockFunctions:
    first = first_of(blocks)
    if not _has_memory(first, *besides) or (first is None and blocks.device.type == "meta"):
        return shapes
    backend = select(blocks.device.type) if first is None else select_by(first)
    return for_tasks(backend, len(blocks.tensors))


def gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    return _for_blocks(blocks).gram_blocks(blocks, problem_of, problems)


def combine_blocks(
    blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
) -> None:
    backend = _for_blocks(blocks, weights)
    increment_version([tensor for tensor in out if tensor is not None])
    backend.combine_blocks(blocks, weights, weights_of, out)


def pcgrad_blocks(blocks: Blocks, order: Tensor, guards: Guards, scale: float, out: Sequence[Tensor | None]) -> Later:
    backend = _for_blocks(blocks, order)
    increment_version([tensor for tensor in out if tensor is not None])
    return backend.pcgrad_blocks(blocks, order, guards, scale, out)


def _solves_on_host() -> bool:
    """Whether T×T problems go to the host's library, whatever backend runs the passes over J."""
    return forced() != "eager" and cpu.why_unavailable("cpu") is None


def method_weights(name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None) -> Tensor | None:
    """A solver's answers by a compiled library: that of the device of G, else the host's; None where there is none.

    Args:
        name: see ``abi.SOLVERS``.
        gram: ``[T, T]`` or ``[S, T, T]`` float64; an answer is NaN where it is not finite.
        parameters: the solver's two, see ``fpg_solver`` in csrc/fastpcgrad.h.
        preference: ``[T]`` float64 on the device of G; None: 1/T each.
    Returns:
        ``[T]`` or ``[S, T]``; of ``project_each`` ``[T, T]`` or ``[S, T, T]``.
    """
    if not _has_memory(gram, preference):
        return shapes.method_weights(name, gram, parameters, preference)
    if gram.is_cpu:
        return cpu.method_weights(name, gram, parameters, preference) if _solves_on_host() else None
    answers = select_by(gram).method_weights(name, gram, parameters, preference)
    if answers is None:
        refuse_capture(gram.device)
    if answers is None and _solves_on_host():
        # The GPU has to be waited for, as by NumPy.
        on_host = None if preference is None else preference.cpu()
        answers = cpu.method_weights(name, gram.cpu(), parameters, on_host)
        answers = None if answers is None else to_device(answers, gram.device)
    return answers


def gradvac(gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor) -> Tensor | None:
    """GradVac's C by a compiled library; None where none is in use on the device of G.

    Args:
        gram: ``[T, T]`` or ``[S, T, T]`` float64; C is NaN where it is not finite, and the targets stay.
        places: ``[S·T, T]`` int64, dense: the task of each row, then the others in the order of their turns.
        targets: of G's shape, dense; updated in place.
    """
    if not _has_memory(gram, places, targets):
        return shapes.gradvac(gram, places, beta, eps, targets)
    if gram.is_cpu:
        return cpu.gradvac(gram, places, beta, eps, targets) if _solves_on_host() else None
    return for_tasks(select_by(gram), gram.shape[-1]).gradvac(gram, places, beta, eps, targets)


def orders(
    variant: Variant, tasks: int, count: int | None, generator: Generator | None, device: torch.device
) -> Tensor:
    """The orders that a variant draws for tensors on ``device``; RuntimeError, before one is drawn, while a graph is
    captured. They lie in the host's memory, from where the functions here take them."""
    if variant.draws and not torch.compiler.is_compiling():
        refuse_capture(device)
    return variant.draw_orders(tasks, count, generator, permutations)


def permutations(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    """The numbers of ``variants.permutations``, in a fraction of the time where the host's library makes them."""
    traced = torch.compiler.is_compiling() or _modes.is_on()
    if traced or not _solves_on_host() or not cpu.draws_as_torch():
        return variants.permutations(count, size, generator)
    return cpu.permutations(count, size, generator)


def sign_sums(rows: Sequence[Tensor | None], weights: Sequence[float] | None, sums: Tensor) -> None:
    _for_columns(sums, rows).sign_sums(rows, weights, sums)


def trimmed_mean(rows: Sequence[Tensor | None], trim: int, out: Tensor) -> None:
    backend = _for_columns(out, rows)
    _mark_written(out)
    backend.trimmed_mean(rows, trim, out)


def _for_columns(written: Tensor, rows: Sequence[Tensor | None]) -> BlockFunctions:
    """For work on columns, which torch does as well: a tracer or a mode cannot look into a library."""
    if torch.compiler.is_compiling() or _modes.is_on() or not _PLAIN.issuperset(map(type, (written, *rows))):
        return eager
    return shapes if written.is_meta else select_by(written)
