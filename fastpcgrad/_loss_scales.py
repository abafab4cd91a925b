"""Trainers that multiply losses by a scale, which gradients are divided by again before the step."""

from __future__ import annotations

import sys
from typing import Any

_REMEDIES = {
    "Accelerate": "use fastpcgrad.integrations.accelerate.GradientSurgery(accelerator, optimizer, tasks=[...])",
    "Lightning": "use fastpcgrad.GradientSurgery and 'with surgery.task(t): self.manual_backward(loss)', of Fabric "
    "fabric.backward(loss)",
}


def refuse_unscaled(wrapper: Any) -> None:
    """RuntimeError where a trainer scales the losses of a wrapped optimizer, and backward passes would not go through
    it: its step would make their gradients smaller by a factor of thousands.

    Args:
        wrapper: the optimizer as the caller has it, what a trainer has made of it included.
    """
    if ("_strategy" in wrapper.__dict__ or "accelerate.state" in sys.modules) and (trainer := _who_scales(wrapper)):
        raise RuntimeError(
            f"{trainer} multiplies losses by a scale (fp16), which pc_backward would pass by: {_REMEDIES[trainer]}"
        )


def _who_scales(wrapper: Any) -> str:
    strategy = vars(wrapper).get("_strategy")  # of Lightning's optimizers, which have all that the wrapped one has
    if strategy is not None:
        precision = getattr(strategy, "precision_plugin", None) or getattr(strategy, "precision", None)
        return "Lightning" if getattr(precision, "scaler", None) is not None else ""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None:
        return ""
    inner = vars(wrapper).get("optimizer")
    is_scaled = getattr(inner, "scaler", None) is not None
    state: Any = accelerate.AcceleratorState._shared_state
    return "Accelerate" if is_scaled or state.get("_mixed_precision") == "fp16" else ""
