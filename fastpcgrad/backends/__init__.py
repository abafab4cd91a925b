"""Which kernels run: chosen by device, or forced with ``FASTPCGRAD_BACKEND=eager|cpu|cuda|triton``.

``protocol`` says what a backend is, ``kernels`` has the functions by which all others get at one. An automatic choice
takes the first that can run, on large packed rows the one that was measured to be faster (``crossovers``); a forced one
that cannot run raises and says why. More tasks than a backend can take go to ``eager``; what is no op and has no memory
behind it, to ``shapes``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .._warnings import warn_once
from . import cpu, crossovers, eager, shapes
from .protocol import Backend, BlockFunctions

if TYPE_CHECKING:
    from . import cuda, triton

    _BACKENDS: tuple[Backend, ...] = (eager, cpu, cuda, triton)
    _WITHOUT_MEMORY: BlockFunctions = shapes

NAMES = ("eager", "cpu", "cuda", "triton")
_VARIABLE = "FASTPCGRAD_BACKEND"
_AUTOMATIC = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
_variables: Any = getattr(os.environ, "_data", None)
_KEY: Any = os.environ.encodekey(_VARIABLE)
_chosen: dict[tuple[str | None, str], Backend] = {}


def forced() -> str | None:
    """The backend that the environment names, at each call: it may be set in a running process.

    Python takes longer to say that a variable is not there than a small model's pass over its gradients does.
    """
    if _variables is None:
        return os.environ.get(_VARIABLE) or None
    return os.environ.decodevalue(_variables[_KEY]) or None if _KEY in _variables else None


@contextmanager
def forcing(name: str) -> Iterator[None]:
    """Within, ``FASTPCGRAD_BACKEND`` names a backend; afterwards it is as before."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


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


def _module(name: str) -> Backend:
    return cast("Backend", importlib.import_module(f".{name}", __name__))


def select(device_type: str, name: str | None = None) -> Backend:
    """The backend module for tensors of that device.

    Args:
        name: of the one to use; otherwise ``FASTPCGRAD_BACKEND`` may hold it.
    Raises:
        RuntimeError: the forced backend cannot run there; says why.
        ValueError: there is no backend of that name.
    """
    if name is None and (_variables is None or _KEY in _variables):
        name = forced()
    module = _chosen.get((name, device_type))
    if module is None:
        module = _chosen[name, device_type] = _choose(name, device_type)
    return module


def _choose(forced: str | None, device_type: str) -> Backend:
    if forced is not None and forced not in NAMES:
        raise ValueError(f"FASTPCGRAD_BACKEND must be one of {', '.join(NAMES)}; found {forced!r}")
    missing = ""
    for name in (forced,) if forced else _AUTOMATIC.get(device_type, ("eager",)):
        reason = why_unavailable(name, device_type)
        if reason is None:
            if missing:
                warn_once(f"{name} runs instead of the compiled {device_type} library, and slower: {missing}")
            return _module(name)
        missing = missing or reason
        if forced:
            raise RuntimeError(
                f"FASTPCGRAD_BACKEND={forced} cannot run tensors on device type {device_type!r}: {reason}"
            )
    raise RuntimeError(f"no backend can run tensors on device type {device_type!r}")


def select_for(op: str, grads: Tensor) -> Backend:
    """The backend for an op on packed rows: as ``select``, but Triton's where that was measured to be faster."""
    module = for_tasks(select_by(grads), grads.shape[0])
    if not grads.is_cuda or grads.nbytes < crossovers.LEAST_NBYTES or not _is_automatic(module):
        return module
    architecture = crossovers.architecture_of(grads.device)
    faster = crossovers.triton_is_faster(op, grads.shape[0], grads.dtype, grads.nbytes, architecture)
    return select("cuda", "triton") if faster and why_unavailable("triton", "cuda") is None else module


def select_by(tensor: Tensor) -> Backend:
    """``select`` by a tensor's device, which takes longer to say its name."""
    return select("cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type)


def for_tasks(backend: Backend, tasks: int) -> Backend:
    """The backend, or ``eager`` for more tasks than it can take."""
    return backend if tasks <= backend.LARGEST_TASKS else eager


def _is_automatic(module: Backend) -> bool:
    """Whether it is the compiled CUDA library, and nobody asked for it."""
    return module.__name__ == f"{__name__}.cuda" and not forced()
