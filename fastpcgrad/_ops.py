"""Every ``torch.ops.fastpcgrad`` schema and its fake. No maths of the algorithms.

Backends register their kernels on ``LIBRARY``, ``_derivatives`` what is differentiated; ``functional`` validates and
calls the ops. ``grads`` is J
``[T, N]``; ``segments`` is None or int64 offsets ``[S + 1]`` on the same device, which cut the N columns into S
ranges, each with a Gram matrix, weights or coefficients of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_arguments
from ._modes import is_captured, is_fake

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


def op_named(name: str) -> Any:
    return getattr(torch.ops.fastpcgrad, name).default


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their memory, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def to_device(tensor: Tensor, device: torch.device, constant: bool = False) -> Tensor:
    """A small tensor from the host's memory on ``device``, without a wait for what a GPU has queued.

    The driver may wait for copies from pageable memory, from about 64 KiB on. It copies from a page-locked copy of its
    own, which nobody overwrites and torch's allocator keeps until the stream has read it. A captured graph would read
    it at each replay, long after it is gone.

    Args:
        constant: whether replays of a captured graph may have the numbers of the capture, which the graph keeps then.
    Raises:
        RuntimeError: others while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or not tensor.is_cpu or is_fake(tensor):
        return tensor.to(device)
    if constant and is_captured(device):
        return _kept_by_graph(tensor, device)
    refuse_capture(device)
    if device.type != "cuda":
        return tensor.to(device)
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


def beside(order: Tensor, other: Tensor) -> Tensor:
    """An order that may lie in the host's memory, on the device of ``other``; who drew it has looked for a capture."""
    return order if order.device == other.device else to_device(order, other.device, constant=True)


def refuse_capture(device: torch.device) -> None:
    """RuntimeError while a CUDA graph is captured: for what the host makes, and another one at each call."""
    if is_captured(device):
        raise RuntimeError(
            "fastpcgrad: what the host draws or computes at each call cannot be captured in a CUDA graph: replays "
            "would repeat that of the capture. Take an order of projections that is not drawn (order='fixed', "
            "variant='tensorflow') or, on packed rows, order= in the GPU's memory, to be filled anew before each "
            "replay; and a method that draws nothing and is solved on the GPU. See docs/usage.md, CUDA graphs"
        )


def _kept_by_graph(tensor: Tensor, device: torch.device) -> Tensor:
    """Written by kernels whose arguments the numbers are, about a hundred a launch: a graph keeps arguments itself."""
    found = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        torch._foreach_add_(found.split(1), tensor.flatten().tolist())
    return found.view(tensor.shape)


def new_gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    """An uninitialised G for ``grads``: float64 ``[T, T]``, or ``[S, T, T]``."""
    tasks = grads.shape[0]
    shape = (tasks, tasks) if segments is None else (segments.shape[0] - 1, tasks, tasks)
    return grads.new_empty(shape, dtype=torch.float64)


def new_figures(grads: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An uninitialised G, C and w for ``grads``."""
    gram = new_gram(grads, segments)
    return gram, torch.empty_like(gram), gram.new_empty(gram.shape[:-1])


def written_by(name: str) -> str | None:
    """The argument that an op overwrites."""
    found = re.search(r"\(a!\) (\w+)", SCHEMAS[name])
    return None if found is None else found[1]


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What serves an op, for calls that come through the dispatcher: nobody has looked at their arguments."""
    names = re.findall(r"(\w+)(?:=\w+)?[,)]", SCHEMAS[name].split(" -> ")[0])
    written = written_by(name)

    def call(*given: Any) -> Any:
        check_arguments(dict(zip(names, given, strict=False)), written)  # defaults are left out
        return function(*given)

    return call


def _fake(name: str) -> Callable[[Callable[..., Any]], None]:
    def register(function: Callable[..., Any]) -> None:
        torch.library.register_fake(f"fastpcgrad::{name}", checked(name, function), lib=LIBRARY)

    return register


@_fake("gram")
def _(grads: Tensor, segments: Tensor | None = None) -> Tensor:
    return new_gram(grads, segments)


@_fake("pcgrad_coefficients")
def _(gram: Tensor, order: Tensor, self_projection: bool, eps: float, min_squared_norm: float) -> Tensor:
    return torch.empty_like(gram, memory_format=torch.contiguous_format)


@_fake("combine")
def _(grads: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    return grads.new_empty(grads.shape[1])


@_fake("combine_out")
def _(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    return None


@_fake("mix_")
def _(grads: Tensor, coefficients: Tensor, segments: Tensor | None = None) -> None:
    return None


@_fake("pcgrad")
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


@_fake("pcgrad_out")
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


@_fake("pcgrad_")
def _(
    grads: Tensor,
    order: Tensor,
    self_projection: bool,
    eps: float,
    min_squared_norm: float,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return new_figures(grads, segments)[:2]
