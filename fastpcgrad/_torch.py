"""The private names of torch that the package uses, each with what stands in for it where a version of torch has none.

The only module that looks for such names, as a test holds. What stands in is slower or refuses more, but is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any

import torch
import torch.utils.hooks
from torch import Tensor
from torch.autograd import forward_ad


def _private(path: str, otherwise: Any) -> Any:
    """What torch has under a dotted path, if it has it."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        return otherwise


def _yes(*_: object) -> bool:
    return True


def _no(*_: object) -> bool:
    return False


# Backward passes.

engine_backward: Callable[..., object] | None = _private("autograd.Variable._execution_engine.run_backward", None)
"""Autograd's engine itself; None: only ``Tensor.backward`` knows it."""


def may_write_kept_graphs() -> bool:
    """Whether a backward pass from inductor's cache may write over a graph that torch has been told to keep.

    Imports inductor. Where this torch does not say what it is set to, the answer is yes.
    """
    try:
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor

        return bool(not functorch.donated_buffer and inductor.fx_graph_cache and not inductor.force_disable_caches)
    except (ImportError, AttributeError):
        return True


def backward_is_compiled() -> bool:
    """Whether compiled autograd runs backward passes; asked of a module that is there if it does."""
    return bool(getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False))


_has_count = _private("utils.hooks.RemovableHandle.next_id", None) is not None
hooks_registered: Callable[[], int] = (
    partial(getattr, torch.utils.hooks.RemovableHandle, "next_id") if _has_count else count().__next__
)
"""How many hooks were ever registered, on anything; where that is unknown, another number each time."""
nodes_made: Callable[[], int] = _private("_C._autograd._get_sequence_nr", lambda: sys.maxsize)
"""The number of the next node of a graph that is made in this thread; where that is unknown, one that none reaches."""


def is_joined(module: torch.nn.Module) -> bool:
    """Whether a module that averages gradients is inside ``join()``: processes that have no more batches take part."""
    return bool(getattr(getattr(module, "_join_config", None), "enable", False))


# Memory and streams.

storage_use_count: Callable[[int], int] | None = _private("_C._storage_Use_Count", None)
"""How many tensors and others hold a storage, by its ``_cdata``; None: unknown."""


def _raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


raw_stream: Callable[[int], int] = _private("_C._cuda_getCurrentRawStream", _raw_stream)
"""The number of a device's current stream, without an object for it."""


# Dispatch keys.


class _KeysByLooks:
    """Stands for a tensor's dispatch keys: none, or all where there are others than those of plain tensors."""

    def __init__(self, tensor: Tensor) -> None:
        plain = tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda")
        self._others = not plain or tensor.is_neg() or tensor.is_conj() or tensor.is_quantized

    def raw_repr(self) -> int:
        return -int(self._others)


def _bits_of(*names: str) -> int | None:
    """The bits of the dispatch keys of these names; None where this torch has not all of them."""
    keys = [_private(f"_C.DispatchKey.{name}", None) for name in names]
    set_of = _private("_C.DispatchKeySet", None)
    if None in (*keys, set_of):
        return None
    bits = 0
    for key in keys:
        bits |= set_of(key).raw_repr()
    return bits


_plain = _bits_of(
    *("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView", "BackendSelect")
)
PLAIN_KEYS: int = _plain or 0
"""The bits of the dispatch keys of plain tensors."""
dispatch_keys: Callable[[Tensor], Any] = _KeysByLooks if _plain is None else _private("_C._dispatch_keys", _KeysByLooks)
"""The dispatch keys of a tensor, which give their bits by ``raw_repr()``."""

below_autograd: Any = _private("_C._AutoDispatchBelowAutograd", None)
"""A context in which the dispatcher passes autograd by; None: unknown."""
keys_below_autograd: Any = _private("_C._after_autograd_keyset", None)
"""The keys that are left there; None: unknown."""


# Modes, transforms and tracers.


def _mode_reader(name: str, otherwise: Callable[[], object]) -> Callable[[], object]:
    read, key = _private("_C._get_dispatch_mode", None), _private(f"_C._TorchDispatchModeKey.{name}", None)
    return otherwise if read is None or key is None else partial(read, key)


class _NoFakeTensor(Tensor):
    """Has no instances: torch itself refuses to give the address of a fake tensor that is not known to be one."""


def _fake_tensor() -> type[Tensor]:
    try:
        from torch._subclasses.fake_tensor import FakeTensor
    except ImportError:
        return _NoFakeTensor
    return FakeTensor


FakeTensor = _fake_tensor()


def _fake_mode_by_trial() -> object:
    made = torch.empty(0, device="cpu")
    return None if type(made) is Tensor else made


def _proxy_mode() -> object:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode()


fake_mode = _mode_reader("FAKE", _fake_mode_by_trial)
"""Something where ``FakeTensorMode`` is on, else None."""
proxy_mode = _mode_reader("PROXY", _proxy_mode)
"""Something where ``make_fx`` writes down what is called, else None."""
count_modes: Callable[[], int] = _private(
    "_C._len_torch_dispatch_stack", _private("utils._python_dispatch.is_in_torch_dispatch_mode", _yes)
)
"""How many modes see the ops of torch."""

DispatchMode: Any = _private("utils._python_dispatch.TorchDispatchMode", None)
"""What a mode that sees the ops of torch is derived from; None: unknown."""


def _transforms_by_stack() -> bool:
    # Without a stack to look at the wrapped tensors are left: they have dispatch keys of their own.
    peek = _private("_C._functorch.peek_interpreter_stack", None)
    return peek is not None and peek() is not None


transforms_active: Callable[[], bool] = _private("_C._are_functorch_transforms_active", _transforms_by_stack)
"""Whether a transform of ``torch.func`` runs."""
is_batched: Callable[[Tensor], bool] = _private("_C._functorch.is_batchedtensor", _yes)
"""Whether ``torch.func.vmap`` batches a tensor; to be asked while a transform runs."""
is_wrapped: Callable[[Tensor], bool] = _private(
    "_C._functorch.is_functorch_wrapped_tensor", lambda _: transforms_active()
)
"""Whether a tensor is that of a transform."""


def _jit_state() -> object:
    return _private("jit.is_tracing", _no)() or None


jit_state: Callable[[], object] = _private("_C._get_tracing_state", _jit_state)
"""Something where ``torch.jit.trace`` runs, else None."""
is_profiling: Callable[[], bool] = _private("_C._autograd._profiler_enabled", _no)
"""Whether a profiler runs. One that is not known to does not show the ops of small calls, and sees all else."""


class _LevelByTrial:
    """Stands for ``torch.autograd.forward_ad``: levels do not nest, so that one can be entered where there is none."""

    @property
    def _current_level(self) -> int:
        try:
            with forward_ad.dual_level():
                return -1
        except RuntimeError:
            return 0


forward_mode: Any = forward_ad if hasattr(forward_ad, "_current_level") else _LevelByTrial()
"""Its ``_current_level`` is >= 0 within a level of forward-mode derivatives."""
