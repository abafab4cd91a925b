"""What a surgery, besides model and optimizer, needs to go on with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ._generators import global_states, set_global_states, set_state, state_of
from ._tasks import TaskNames, check_names
from .methods import Method
from .rows.reach import Reach


def surgery_state(
    method: Method, tasks: TaskNames, reach: Reach | None, parameters: Sequence[Tensor], *, global_generators: bool
) -> dict[str, Any]:
    """See ``GradientSurgery.state_dict``."""
    state = {"method": method.state_dict(), "generator": state_of(method.generator)}
    if tasks:
        state["tasks"] = list(tasks)
    if reach is not None:
        state["reach"] = reach.state_dict(parameters)
    return {**state, "global_generators": global_states()} if global_generators else state


def load_surgery_state(
    method: Method, tasks: TaskNames, reach: Reach | None, parameters: Sequence[Tensor], state: Mapping[str, Any]
) -> None:
    """See ``GradientSurgery.load_state_dict``."""
    keys = set(state)
    if not {"method", "generator"} <= keys <= {"method", "generator", "tasks", "reach", "global_generators"}:
        raise ValueError(
            "the state of a surgery has the keys method, generator and maybe tasks, reach and global_generators; found "
            f"{sorted(keys)}"
        )
    check_names(tasks, state.get("tasks"))
    if reach is not None and "reach" in state:
        Reach.check_state(state["reach"], parameters)
    before = surgery_state(method, tasks, reach, parameters, global_generators="global_generators" in state)
    try:
        _take_up(method, reach, parameters, state)
    except BaseException:
        _take_up(method, reach, parameters, before)
        raise
    method.forget_problems()


def _take_up(method: Method, reach: Reach | None, parameters: Sequence[Tensor], state: Mapping[str, Any]) -> None:
    set_state(method.generator, state["generator"])
    method.load_state_dict(state["method"])
    if reach is not None and "reach" in state:  # else it is learned anew
        reach.load_state_dict(state["reach"], parameters)
    if "global_generators" in state:
        set_global_states(state["global_generators"])
