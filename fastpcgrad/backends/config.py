"""show_config: what this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import os

import numpy
import torch

from .. import backends
from .._version import __version__
from . import native


def show_config() -> str:
    """Versions, backends (and why one is missing), threads and instruction set: printed, and returned as text."""
    lines = [
        f"fastpcgrad {__version__}, torch {torch.__version__}, numpy {numpy.__version__}",
        f"threads: {torch.get_num_threads()}",
        f"FASTPCGRAD_BACKEND: {os.environ.get('FASTPCGRAD_BACKEND') or 'not set (automatic)'}",
    ]
    for device_type in ("cpu", "cuda"):
        if device_type == "cuda" and not torch.cuda.is_available():
            lines.append("CUDA tensors: this torch sees no CUDA device")
            lines.append(f"  cuda: {native.load_error('cuda') or 'the library is here and can be loaded'}")
            continue
        lines.append(f"{device_type} tensors: {backend_in_use(device_type, detailed=False)}")
        for name in backends.NAMES:
            reason = backends.why_unavailable(name, device_type)
            lines.append(f"  {name}: {'available' + _detail(name) if reason is None else reason}")
    text = "\n".join(lines)
    print(text)
    return text


def backend_in_use(device_type: str = "cpu", *, detailed: bool = True) -> str:
    """What runs the kernels on tensors of that device, or why nothing does.

    Args:
        detailed: with the instruction set, where the backend has several.
    """
    try:
        name = str(backends.select(device_type).__name__.rpartition(".")[2])
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    return name + (_detail(name) if detailed else "")


def _detail(name: str) -> str:
    if name != "cpu":
        return ""
    from . import cpu

    return f" ({cpu.isa()})"
