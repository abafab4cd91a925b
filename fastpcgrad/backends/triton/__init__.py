"""The Triton backend: CUDA devices, or any device under Triton's interpreter (``TRITON_INTERPRET=1``).

Triton is imported at the first call, not with the package.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ...variants import Guards
from ..eager import LARGEST_TASKS, gradvac, method_weights, sign_sums, trimmed_mean

if TYPE_CHECKING:
    from .launch import combine, gram, mix_, pcgrad, pcgrad_, pcgrad_coefficients
    from .tables import combine_blocks, gram_blocks, pcgrad_blocks, workspace_nbytes

__all__ = [
    "LARGEST_TASKS",
    "combine",
    "combine_blocks",
    "gradvac",
    "gram",
    "gram_blocks",
    "method_weights",
    "mix_",
    "pcgrad",
    "pcgrad_",
    "pcgrad_blocks",
    "pcgrad_coefficients",
    "sign_sums",
    "trimmed_mean",
    "why_unavailable",
    "workspace_nbytes",
]


def why_unavailable(device_type: str) -> str | None:
    """None where this backend can run tensors of that device, else the reason."""
    try:
        launch = importlib.import_module(".launch", __name__)
    except Exception as error:  # Triton raises more than ImportError where its libraries do not fit the machine.
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if launch.interpreted():
        return None
    if device_type == "cuda":
        return _why_nothing_runs(torch.cuda.current_device()) if torch.cuda.is_available() else _NO_DEVICE
    return (
        f"Triton compiles for CUDA devices; found device type {device_type!r} "
        "(TRITON_INTERPRET=1, set before triton is imported, runs the kernels anywhere)"
    )


_NO_DEVICE = "this torch sees no CUDA device"


@cache
def _why_nothing_runs(device: int) -> str | None:
    """Found by the smallest launch, once a device: Triton can be imported where it finds no C compiler."""
    launch = importlib.import_module(".launch", __name__)
    one = torch.ones((1, 1), dtype=torch.float64, device=torch.device("cuda", device))
    try:
        launch.pcgrad_coefficients(one, torch.zeros_like(one, dtype=torch.int64), Guards())
    except Exception as error:  # a compiler's, a driver's or Triton's own
        return f"triton cannot run a kernel on this device: {type(error).__name__}: {error}"
    return None


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = ".tables" if name.endswith("_blocks") or name == "workspace_nbytes" else ".launch"
        return getattr(importlib.import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
