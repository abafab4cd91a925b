"""How the scenarios of a module are collected, for ``ranks`` to run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Function = Callable[..., Any]


class Scenarios(dict[str, Callable[[], None]]):
    """Functions without arguments by their names, each run by all processes.

    Args:
        around: what each is called by.
    """

    def __init__(self, around: Callable[[Callable[[], None]], None] = lambda function: function()) -> None:
        super().__init__()
        self._around = around

    def one(self, function: Function) -> Function:
        """A decorator: a scenario."""
        self[function.__name__] = partial(self._around, function)
        return function

    def each(self, **cases: Any) -> Callable[[Function], Function]:
        """A decorator: a scenario for each case, with it as argument."""

        def register(function: Function) -> Function:
            for name, case in cases.items():
                self[f"{function.__name__} ({name})"] = partial(self._around, partial(function, case))
            return function

        return register
