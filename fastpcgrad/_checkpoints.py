"""What a surgery, besides model and optimizer, needs to go on with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._generators import global_states, set_global_states, set_state, state_of
from .methods import Method


def surgery_state(method: Method, *, global_generators: bool) -> dict[str, Any]:
    """See ``GradientSurgery.state_dict``."""
    state = {"method": method.state_dict(), "generator": state_of(method.generator)}
    return {**state, "global_generators": global_states()} if global_generators else state


def load_surgery_state(method: Method, state: Mapping[str, Any]) -> None:
    """See ``GradientSurgery.load_state_dict``."""
    keys = set(state)
    if not {"method", "generator"} <= keys <= {"method", "generator", "global_generators"}:
        raise ValueError(
            f"the state of a surgery has the keys method, generator and maybe global_generators; found {sorted(keys)}"
        )
    before = state_of(method.generator)
    set_state(method.generator, state["generator"])
    try:
        method.load_state_dict(state["method"])
    except BaseException:
        set_state(method.generator, before)
        raise
    if "global_generators" in state:
        set_global_states(state["global_generators"])
