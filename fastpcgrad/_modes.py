"""Who else looks at a call (autograd, transforms, modes, tracers), and which tensors have no memory behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _get_dispatch_mode,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._autograd import _profiler_enabled
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

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
"""The dispatch keys of plain tensors."""

_NO_TENSORS = {type(None), bool, float}
_FAKE, _PROXY = _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY


def is_on() -> bool:
    """Whether this thread is inside a mode, a transform or a level of forward-mode derivatives."""
    return bool(_len_torch_dispatch_stack() or _are_functorch_transforms_active() or forward_ad._current_level >= 0)


def is_watched(arguments: Sequence[object]) -> bool:
    """Whether a call concerns more than the kernel: autograd, a transform, a mode, a tracer, the profiler.

    Or the dispatcher itself, where a tensor is no plain one on a CPU or a CUDA device.
    """
    keys = 0
    for argument in arguments:
        if type(argument) is Tensor:
            if argument.requires_grad and torch.is_grad_enabled():
                return True
            keys |= _dispatch_keys(argument).raw_repr()
        elif type(argument) not in _NO_TENSORS:
            return True
    return bool(keys & ~_UNWATCHED) or is_on() or _get_tracing_state() is not None or _profiler_enabled()


def is_fake(tensor: Tensor) -> bool:
    """Whether there is no memory behind a tensor: only its shape is asked for.

    Those of ``FakeTensorMode``, in which memory estimators and exporters run a model, and of the meta device.
    """
    return tensor.is_meta or (type(tensor) is not Tensor and isinstance(tensor, FakeTensor))


def is_faking() -> bool:
    """Whether ``FakeTensorMode`` is on, which gives fake tensors to whoever makes one."""
    return _get_dispatch_mode(_FAKE) is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether it is one of many under ``torch.func.vmap``, which has no numbers to look at."""
    return _are_functorch_transforms_active() and torch._C._functorch.is_batchedtensor(tensor)


def refuse_tracers(tensor: Tensor | None) -> None:
    """RuntimeError where what is computed without an op would be missing from a trace or a derivative."""
    traced = _get_dispatch_mode(_PROXY) is not None
    if traced or (tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)):
        raise RuntimeError(
            "fastpcgrad: a method's weights and a surgery of gradients in .grad cannot be traced by make_fx or "
            "transformed by torch.func: call them outside of it, on tensors that are detached"
        )
