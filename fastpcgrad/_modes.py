"""Who else looks at a call (autograd, transforms, modes, tracers, CUDA graphs), and which tensors have no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _torch
from ._torch import (
    PLAIN_KEYS,
    FakeTensor,
    count_modes,
    dispatch_keys,
    fake_mode,
    forward_mode,
    is_profiling,
    is_wrapped,
    jit_state,
    proxy_mode,
    transforms_active,
)

_NO_TENSORS = {type(None), bool, float}
_P = ParamSpec("_P")
_R = TypeVar("_R")


def not_compiled(door: Callable[_P, _R]) -> Callable[_P, _R]:
    """A door at which ``torch.compile`` breaks the graph: behind it gradients themselves are looked at, and their
    memory."""

    @wraps(door)
    def call(*args: _P.args, **named: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            eager = torch.compiler.disable(door, reason="surgery needs the gradients themselves")
            return eager(*args, **named)
        return door(*args, **named)

    return call


def is_on() -> bool:
    """Whether this thread is inside a mode, a transform or a level of forward-mode derivatives."""
    return bool(count_modes() or transforms_active() or forward_mode._current_level >= 0)


def is_watched(arguments: Sequence[object]) -> bool:
    """Whether a call concerns more than the kernel: autograd, a transform, a mode, a tracer, the profiler.

    Or the dispatcher itself, where a tensor is no plain one on a CPU or a CUDA device.
    """
    keys = 0
    for argument in arguments:
        if type(argument) is Tensor:
            if argument.requires_grad and torch.is_grad_enabled():
                return True
            keys |= dispatch_keys(argument).raw_repr()
        elif type(argument) not in _NO_TENSORS:
            return True
    return bool(keys & ~PLAIN_KEYS) or is_on() or jit_state() is not None or is_profiling()


def is_fake(tensor: Tensor) -> bool:
    """Whether there is no memory behind a tensor: only its shape is asked for.

    Those of ``FakeTensorMode``, in which memory estimators and exporters run a model, and of the meta device.
    """
    return tensor.is_meta or (type(tensor) is not Tensor and isinstance(tensor, FakeTensor))


def is_faking() -> bool:
    """Whether ``FakeTensorMode`` is on, which gives fake tensors to whoever makes one."""
    return fake_mode() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether it is one of many under ``torch.func.vmap``, which has no numbers to look at."""
    return transforms_active() and _torch.is_batched(tensor)


def is_captured(device: torch.device) -> bool:
    """Whether what is queued on that device now goes into a CUDA graph: each device has a current stream of its own."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_tracers(tensor: Tensor | None) -> None:
    """RuntimeError where what is computed without an op would be missing from a trace or a derivative."""
    traced = proxy_mode() is not None
    if traced or (tensor is not None and is_wrapped(tensor)):
        raise RuntimeError(
            "fastpcgrad: a method's weights and a surgery of gradients in .grad cannot be traced by make_fx or "
            "transformed by torch.func: call them outside of it, on tensors that are detached"
        )
