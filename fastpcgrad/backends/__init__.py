"""Which kernels run an op: chosen by device, or forced with ``FASTPCGRAD_BACKEND=eager|cpu|cuda|triton``.

Every backend module offers the same six functions (``gram``, ``pcgrad_coefficients``, ``combine``, ``mix_``,
``pcgrad``, ``pcgrad_``) on inputs that ``functional`` has validated, and ``why_unavailable(device_type)``. An
automatic choice takes the first backend that can run, on large packed rows the one that was measured to be faster
(``crossovers``); a forced one that cannot run raises and says why. ``pcgrad`` and
``pcgrad_`` return G, C and w, or nothing if told so: then these may lie in the workspace.

For task gradients that lie where autograd put them (``Blocks``) it offers ``gram_blocks``, ``combine_blocks`` and
``pcgrad_blocks`` besides: its own, or those of ``stacked`` over its functions on packed rows. For methods that look at
each column it has ``sign_sums`` and ``trimmed_mean``, on rows that need not lie together: its own, or those of
``eager``. The compiled libraries have ``method_weights`` and ``gradvac``, for which methods have
NumPy and torch otherwise. ``shapes`` stands for all of these where tensors have no memory.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _modes, _ops
from .._blocks import Blocks, first_of
from .._checks import check_apart, check_out
from .._memory import prefer_huge_pages
from .._warnings import warn_once
from . import cpu, crossovers, eager, shapes

NAMES = ("eager", "cpu", "cuda", "triton")
_VARIABLE = "FASTPCGRAD_BACKEND"
_AUTOMATIC = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
_variables: Any = getattr(os.environ, "_data", None)
_KEY: Any = os.environ.encodekey(_VARIABLE)
_chosen: dict[tuple[str | None, str], ModuleType] = {}


def _forced() -> str | None:
    """The backend that the environment names, at each call: it may be set in a running process.

    Python takes longer to say that a variable is not there than a small model's pass over its gradients does.
    """
    if _variables is None:
        return os.environ.get(_VARIABLE) or None
    return os.environ.decodevalue(_variables[_KEY]) or None if _KEY in _variables else None


def why_unavailable(name: str, device_type: str) -> str | None:
    """None where backend ``name`` can run tensors of that device, else the reason."""
    try:
        module = importlib.import_module(f".{name}", __name__)
    except ImportError as error:
        if error.name == f"{__name__}.{name}":
            return f"this version has no {name} backend"
        return f"{type(error).__name__}: {error}"
    reason: str | None = module.why_unavailable(device_type)
    return reason


def select(device_type: str, forced: str | None = None) -> ModuleType:
    """The backend module for tensors of that device.

    Args:
        forced: the name of one; otherwise ``FASTPCGRAD_BACKEND`` may hold it.
    Raises:
        RuntimeError: the forced backend cannot run there; says why.
        ValueError: there is no backend of that name.
    """
    forced = forced or _forced()
    module = _chosen.get((forced, device_type))
    if module is None:
        module = _chosen[forced, device_type] = _choose(forced, device_type)
    return module


def _choose(forced: str | None, device_type: str) -> ModuleType:
    if forced is not None and forced not in NAMES:
        raise ValueError(f"FASTPCGRAD_BACKEND must be one of {', '.join(NAMES)}; found {forced!r}")
    if device_type == "meta":
        return shapes
    missing = ""
    for name in (forced,) if forced else _AUTOMATIC.get(device_type, ("eager",)):
        reason = why_unavailable(name, device_type)
        if reason is None:
            if missing:
                warn_once(f"{name} runs instead of the compiled {device_type} library, and slower: {missing}")
            return importlib.import_module(f".{name}", __name__)
        missing = missing or reason
        if forced:
            raise RuntimeError(
                f"FASTPCGRAD_BACKEND={forced} cannot run tensors on device type {device_type!r}: {reason}"
            )
    raise RuntimeError(f"no backend can run tensors on device type {device_type!r}")


def select_for(op: str, grads: Tensor) -> ModuleType:
    """The backend module for an op on packed rows: as ``select``, but Triton's where that was measured to be faster."""
    if grads.is_cpu:  # to ask for the device's name takes longer
        return select("cpu")
    module = select(grads.device.type)
    if not grads.is_cuda or grads.nbytes < crossovers.LEAST_NBYTES or not _is_automatic(module):
        return module
    architecture = crossovers.architecture_of(grads.device)
    faster = crossovers.triton_is_faster(op, grads.shape[0], grads.dtype, grads.nbytes, architecture)
    return select("cuda", "triton") if faster and why_unavailable("triton", "cuda") is None else module


def _is_automatic(module: ModuleType) -> bool:
    """Whether it is the compiled CUDA library, and nobody asked for it."""
    return module.__name__ == f"{__name__}.cuda" and not _forced()


def _gram(grads: Tensor, segments: Tensor | None = None) -> Tensor:
    result: Tensor = select_for("gram", grads).gram(grads, segments)
    return result


def _pcgrad_coefficients(
    gram: Tensor, order: Tensor, self_projection: bool, eps: float, min_squared_norm: float
) -> Tensor:
    backend = select(gram.device.type)
    result: Tensor = backend.pcgrad_coefficients(gram, order, self_projection, eps, min_squared_norm)
    return result


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
    backend = select_for("pcgrad", grads)
    return out, *backend.pcgrad(grads, order, self_projection, eps, min_squared_norm, scale, segments, out, figures)


def _pcgrad_out(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    scale: float,
    segments: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    check_out(out, grads)
    check_apart("out", out, order, segments)
    _mark_written(out)
    result: tuple[Tensor, Tensor, Tensor] = select_for("pcgrad", grads).pcgrad(
        grads, order, self_projection, eps, min_squared_norm, scale, segments, out
    )
    return result


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
    result: tuple[Tensor, ...] = select("cpu" if grads.is_cpu else grads.device.type).pcgrad_(
        grads, order, self_projection, eps, min_squared_norm, segments, figures
    )
    return result


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
        return True
    _modes.refuse_tracers(given)
    if _modes.is_faking() or (given is not None and _modes.is_fake(given)):
        return False
    if any(tensor is not None and _modes.is_fake(tensor) for tensor in besides):
        raise TypeError("a tensor of FakeTensorMode or of the meta device cannot be used with gradients that are none")
    return True


def _for_blocks(blocks: Blocks, *besides: Tensor | None) -> ModuleType:
    first = first_of(blocks)
    if not _has_memory(first, *besides):
        return shapes
    return select("cpu" if first is not None and first.is_cpu else blocks.device.type)


def _gram_blocks(blocks: Blocks, problem_of: Sequence[int] | None, problems: int) -> Tensor:
    """G of each problem, ``[problems, T, T]``; block b counts for ``problem_of[b]``, -1: none; None: 0 for all."""
    result: Tensor = _for_blocks(blocks).gram_blocks(blocks, problem_of, problems)
    return result


def _combine_blocks(
    blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None]
) -> None:
    """Each block combined with its row of ``weights`` ``[count, T]`` into ``out[b]``, which may be a row of it."""
    backend = _for_blocks(blocks, weights)
    increment_version([tensor for tensor in out if tensor is not None])
    backend.combine_blocks(blocks, weights, weights_of, out)


def _pcgrad_blocks(
    blocks: Blocks,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    scale: float,
    out: Sequence[Tensor | None],
) -> _ops.Later:
    """G, C and w of one problem over all blocks, and w J in ``out``."""
    backend = _for_blocks(blocks, order)
    increment_version([tensor for tensor in out if tensor is not None])
    result: _ops.Later = backend.pcgrad_blocks(blocks, order, self_projection, eps, min_squared_norm, scale, out)
    return result


def _solves_on_host() -> bool:
    """Whether T×T problems go to the host's library, whatever backend runs the passes over J."""
    return _forced() != "eager" and cpu.why_unavailable("cpu") is None


def _method_weights(name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None) -> Tensor | None:
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
    solve = getattr(select(gram.device.type), "method_weights", None)
    answers: Tensor | None = None if solve is None else solve(name, gram, parameters, preference)
    if answers is None and _solves_on_host():
        # The GPU has to be waited for, as by NumPy.
        on_host = None if preference is None else preference.cpu()
        answers = cpu.method_weights(name, gram.cpu(), parameters, on_host)
        answers = None if answers is None else _ops.to_device(answers, gram.device)
    return answers


def _gradvac(gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor) -> Tensor | None:
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
    turn = getattr(select(gram.device.type), "gradvac", None)
    coefficients: Tensor | None = None if turn is None else turn(gram, places, beta, eps, targets)
    return coefficients


def _sign_sums(rows: Sequence[Tensor | None], weights: Sequence[float] | None, sums: Tensor) -> None:
    """Σ_t w_t max(g_t, 0) and Σ_t w_t min(g_t, 0) of each column, w_t = 1 for None; NaN is in one of them.

    Args:
        rows: T rows ``[n]``; None: zeros.
        sums: where both go, ``[2, n]`` dense, fp64 for fp64 rows, else fp32.
    """
    _traceable(sums, rows).sign_sums(rows, weights, sums)


def _trimmed_mean(rows: Sequence[Tensor | None], trim: int, out: Tensor) -> None:
    """The mean of each column without its ``trim`` largest and smallest entries, NaN where one is not finite.

    Args:
        rows: T rows ``[n]``, T > 2 trim; None: zeros.
        out: ``[n]``; may be one of the rows.
    """
    _traceable(out, rows).trimmed_mean(rows, trim, out)


def _traceable(written: Tensor, rows: Sequence[Tensor | None]) -> ModuleType:
    """The backend for work on columns, which torch does as well: a tracer or a mode cannot look into a library."""
    if torch.compiler.is_compiling() or _modes.is_on() or not _PLAIN.issuperset(map(type, (written, *rows))):
        return eager
    return select(written.device.type)


def _mark_written(tensor: Tensor) -> None:
    # Autograd must notice that a tensor which it saved has been overwritten.
    if not tensor.is_inference():
        increment_version(tensor)


_ops.KERNELS.update(
    gram=_gram,
    pcgrad_coefficients=_pcgrad_coefficients,
    combine=_combine,
    combine_out=_combine_out,
    mix_=_mix_,
    pcgrad=_pcgrad,
    pcgrad_out=_pcgrad_out,
    pcgrad_=_pcgrad_,
)
for _name, _kernel in _ops.KERNELS.items():
    # One Python body serves both dispatch keys: the backend decides by the tensor's device.
    for _key in ("CPU", "CUDA"):
        _ops.LIBRARY.impl(_name, _ops.checked(_name, _kernel), _key)

_ops.KERNELS.update(
    gram_blocks=_gram_blocks,
    combine_blocks=_combine_blocks,
    pcgrad_blocks=_pcgrad_blocks,
    gradvac=_gradvac,
    method_weights=_method_weights,
    sign_sums=_sign_sums,
    trimmed_mean=_trimmed_mean,
    pcgrad=partial(_pcgrad, figures=False),
    pcgrad_=partial(_pcgrad_, figures=False),
)
