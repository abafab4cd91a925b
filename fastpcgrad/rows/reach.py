"""Which parameters two tasks or more reach: the trunk, as the gradients themselves show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from .._graph import leaf_of, nodes
from .._warnings import warn

AUTO = "auto"
Touches = Callable[[int], Iterable[bool]]
"""For a parameter, by its index, which tasks have a gradient of it."""

_PICKS = {
    f"{name}Backward0"
    for name in ("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Index", "IndexSelect", "Gather")
}
_JOINS = {"StackBackward0", "CatBackward0"}


class Reach:
    """Of each parameter the tasks that have had a gradient of it, in all rounds so far.

    What is known stays: a parameter of the trunk does not become one of a head because its other tasks are absent.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, int]] = {}  # by the parameter's id; the tasks are bits
        self._tasks = 0
        self._looked = False

    def look(self, losses: Sequence[Tensor]) -> None:
        """Once, see ``check_told_apart``."""
        if not self._looked:
            check_told_apart(losses)
            self._looked = True

    def check_known(self, count: int, tasks: Iterable[int]) -> None:
        """RuntimeError where one of ``count`` tasks has never been there, nor is it one of ``tasks``, which are now."""
        known = self._tasks | _bits(tasks)
        if missing := [task for task in range(count) if not known >> task & 1]:
            raise RuntimeError(
                f"'auto' takes from the gradients which parameters two tasks or more reach, and tasks {missing} have "
                "never been there: let the first round have all tasks, or give the parameters themselves"
            )

    def learn(self, parameters: Sequence[Tensor], tasks: Sequence[int], touched: Touches) -> None:
        """Note a round; of parameters that are known to be shared there is nothing more to learn.

        Args:
            tasks: that are there.
            touched: by the index of a parameter which of them have a gradient of it.
        Warns:
            FastPCGradWarning: what was merged as a head's so far turns out to be the trunk's.
        """
        late = 0
        self._tasks |= _bits(tasks)
        for index, p in enumerate(parameters):
            before = self._of(p)
            if _are_several(before):
                continue
            now = before | _bits(compress(tasks, touched(index)))
            if now != before:
                self._seen[id(p)] = p, now
                late += bool(before) and _are_several(now)
        if late:
            warn(
                f"'auto': {late} parameters that one task alone has reached so far are reached by another too, and "
                "count as shared from now on: give the parameters themselves if the rounds before should have known"
            )

    def are_shared(self, parameters: Iterable[Tensor]) -> list[bool]:
        """For each whether two tasks or more reach it."""
        return [_are_several(self._of(p)) for p in parameters]

    def _of(self, p: Tensor) -> int:
        return self._seen.get(id(p), (p, 0))[1]

    def state_dict(self, parameters: Iterable[Tensor]) -> dict[str, Any]:
        """What is known of parameters, in their order."""
        return {"tasks": self._tasks, "reached": list(map(self._of, parameters))}

    @staticmethod
    def check_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """ValueError where it is of another number of parameters."""
        found = len(state.get("reached", ()))
        if set(state) != {"tasks", "reached"} or found != len(parameters):
            raise ValueError(
                f"reach must hold tasks and reached, of {len(parameters)} parameters; found {sorted(state)}, of {found}"
            )

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take up what ``state_dict`` gave, and ``check_state`` has looked at."""
        self._tasks = state["tasks"]
        self._seen = {id(p): (p, tasks) for p, tasks in zip(parameters, state["reached"], strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        return {"tasks": self._tasks, "seen": list(self._seen.values())}  # a copy's parameters have other ids

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._tasks, self._looked = state["tasks"], False
        self._seen = {id(p): (p, tasks) for p, tasks in state["seen"]}


def _bits(tasks: Iterable[int]) -> int:
    mask = 0
    for task in tasks:
        mask |= 1 << task
    return mask


def _are_several(mask: int) -> bool:
    return bool(mask & (mask - 1))


def check_told_apart(losses: Sequence[Tensor]) -> None:
    """ValueError where losses are picked out of what was joined of several: autograd gives what lies behind the other
    parts gradients of zeros, by which each loss seems to reach it."""
    for node in nodes(losses):
        if node.name() in _PICKS and (join := _joined_below(node)) is not None:
            behind = [_leaves_behind(child) for child, _ in join.next_functions]
            if any(own != behind[0] for own in behind):
                raise ValueError(
                    f"'auto' cannot tell trunk and heads apart: losses are picked out of what {join.name()} joined, "
                    "so that each has gradients of zeros of what the others depend on; give losses that are made one "
                    "by one of each head's own output, or the parameters themselves"
                )


def _joined_below(node: Any) -> Any | None:
    """What was joined that a node picks from, as it is or element by element."""
    while True:
        below = [child for child, _ in node.next_functions if child is not None]
        if len(below) != 1 or leaf_of(below[0]) is not None:
            return None
        node = below[0]
        if node.name() in _JOINS:
            return node


def _leaves_behind(node: Any | None) -> set[int]:
    found, seen, queue = set[int](), {node}, [node]
    while queue:
        node = queue.pop()
        if node is None:
            continue
        if (leaf := leaf_of(node)) is not None:
            found.add(id(leaf))
        below = [child for child, _ in node.next_functions if child not in seen]
        seen.update(below)
        queue += below
    return found
