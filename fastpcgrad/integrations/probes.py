"""Forward passes beside the training's own, that it does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._generators import global_states, set_global_states
from ..monitor import ConflictMonitor


def probe(monitor: ConflictMonitor, model: nn.Module, losses: Callable[[], Any]) -> None:
    """A call of ``observe``, with losses of a forward pass of their own where it is time to look."""
    if not monitor.is_time:
        monitor.observe([])  # one that does not look counts, too
        return
    with undisturbed(model):
        monitor.observe(losses())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with gradients; each module's mode and all global generators are afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    states = global_states()
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_global_states(states)
