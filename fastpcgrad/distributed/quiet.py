"""Modules that average gradients, while each process runs backward passes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SPEAKING = ("require_backward_grad_sync", "broadcast_buffers")
"""Attributes of DistributedDataParallel by which a forward pass prepares to average, or sends buffers."""
_ARMED = "require_forward_param_sync"
"""The one by which a forward pass says whether its backward pass averages."""


def is_armed(module: Any) -> bool:
    """Whether the last forward pass of a module that averages has prepared to do so in its backward pass."""
    return bool(getattr(module, _ARMED))


class Silence:
    """Forward passes within it speak to no other process, nor do their backward passes; afterwards all is as before.

    Args:
        modules: that do otherwise.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules, self._before = (
            modules,
            [(module, name, getattr(module, name)) for module in modules for name in (*_SPEAKING, _ARMED)],
        )

    def begin(self) -> None:
        for module in self._modules:
            for name in _SPEAKING:
                setattr(module, name, False)

    def check(self) -> None:
        """RuntimeError where the last forward pass of a module was before, and prepared to average."""
        for module in self._modules:
            if is_armed(module):
                raise RuntimeError(
                    f"{type(module).__name__} may have averaged this task's gradients with those of other tasks: run "
                    "its forward pass inside 'with surgery.task(t)', or inside no_sync() where tasks share it"
                )

    def end(self) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)
