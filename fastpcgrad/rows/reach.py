"""Which parameters two tasks or more reach: the trunk, as the gradients themselves show it."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

from torch import Tensor

from .._modes import is_captured, is_fake
from .._warnings import warn

AUTO = "auto"


class Found(NamedTuple):
    """What a round has found of its parameters, by their index.

    Attributes:
        tasks: that are there.
        touched: of a parameter which of them have a gradient of it.
        squares: of some parameters the squared norms of their gradients, ``[k, T]``; zero where there is none. Alike in
            all processes that have parts of them.
    """

    tasks: Sequence[int]
    touched: Callable[[int], Iterable[bool]]
    squares: Callable[[Sequence[int]], Tensor]


class Reach:
    """Of each parameter the tasks that have had a gradient of it, in all rounds so far.

    One of zeros is none: autograd gives them to what a loss does not depend on, wherever outputs are joined and taken
    apart again, come out of one compiled model or one custom function, or are multiplied by zeros.

    What is known stays: a parameter of the trunk does not become one of a head because its other tasks are absent.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by the parameter's id; the tasks are bits
        self._tasks = 0

    def check_known(self, count: int, tasks: Iterable[int]) -> None:
        """RuntimeError where one of ``count`` tasks has never been there, nor is it one of ``tasks``, which are now."""
        known = self._tasks | _bits(tasks)
        if missing := [task for task in range(count) if not known >> task & 1]:
            raise RuntimeError(
                f"'auto' takes from the gradients which parameters two tasks or more reach, and tasks {missing} have "
                "never been there: let the first round have all tasks, or give the parameters themselves"
            )

    def learn(self, parameters: Sequence[Tensor], found: Found) -> None:
        """Note a round; of parameters that are known to be shared there is nothing more to learn.

        Raises:
            RuntimeError: gradients are to be looked at while a CUDA graph is captured.
        Warns:
            FastPCGradWarning: what was merged as a head's so far turns out to be the trunk's.
        """
        more: dict[int, int] = {}  # by the index of a parameter
        for index, p in enumerate(parameters):
            before = self._of(p)
            if not _are_several(before) and (new := _bits(compress(found.tasks, found.touched(index))) & ~before):
                more[index] = new
        if more:
            there = _are_not_zero(found, list(more), parameters[next(iter(more))])
            more = {index: _bits(compress(found.tasks, own)) for index, own in zip(more, there, strict=True)}
        self._tasks |= _bits(found.tasks)
        late = 0
        for index, new in more.items():
            before = self._of(parameters[index])
            if now := before | new:
                self._note(parameters[index], now)
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
        reference, tasks = self._seen.get(id(p), (None, 0))
        return tasks if reference is not None and reference() is p else 0

    def _note(self, p: Tensor, tasks: int) -> None:
        self._seen[id(p)] = weakref.ref(p), tasks

    def state_dict(self, parameters: Iterable[Tensor]) -> dict[str, Any]:
        """What is known of parameters, in their order."""
        return {"tasks": self._tasks, "reached": list(map(self._of, parameters))}

    def digest(self, parameters: Iterable[Tensor]) -> str:
        """Of what must be alike in all processes."""
        return hashlib.blake2b(repr(self.state_dict(parameters)).encode(), digest_size=4).hexdigest()

    @staticmethod
    def check_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """ValueError where it is of another number of parameters, or holds no numbers."""
        if set(state) != {"tasks", "reached"}:
            raise ValueError(f"reach must hold tasks and reached; found {sorted(state)}")
        found = list(state["reached"])
        if len(found) != len(parameters):
            raise ValueError(
                f"reach, which 'auto' has learned, must be of the {len(parameters)} parameters that there are; found "
                f"it of {len(found)}"
            )
        if bad := [tasks for tasks in (state["tasks"], *found) if not isinstance(tasks, int) or tasks < 0]:
            raise ValueError(f"reach must hold integers, with a bit for each task; found {bad[0]!r}")

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take up what ``state_dict`` gave, and ``check_state`` has looked at."""
        self._take(state["tasks"], zip(parameters, state["reached"], strict=True))

    def __getstate__(self) -> dict[str, Any]:
        seen = ((reference(), tasks) for reference, tasks in self._seen.values())
        return {"tasks": self._tasks, "seen": [(p, tasks) for p, tasks in seen if p is not None]}  # a copy has others

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._take(state["tasks"], state["seen"])

    def _take(self, tasks: int, seen: Iterable[tuple[Tensor, int]]) -> None:
        self._tasks, self._seen = tasks, {}
        for p, reached in seen:
            self._note(p, reached)


def _bits(tasks: Iterable[int]) -> int:
    mask = 0
    for task in tasks:
        mask |= 1 << task
    return mask


def _are_several(mask: int) -> bool:
    return bool(mask & (mask - 1))


def _are_not_zero(found: Found, asked: Sequence[int], parameter: Tensor) -> list[list[bool]]:
    """For each parameter and task whether it has a gradient other than zeros."""
    if is_captured(parameter.device):
        raise RuntimeError(
            "'auto' looks at gradients until it knows which parameters two tasks or more reach, which cannot be "
            "captured in a CUDA graph: run a round before, or give the parameters themselves"
        )
    squares = found.squares(asked)
    if is_fake(squares):  # of which nobody knows what they hold
        return [list(found.touched(index)) for index in asked]
    there: list[list[bool]] = (squares != 0).tolist()
    return there
