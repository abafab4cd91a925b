"""The category of every warning of this package, so that one filter finds them all, and how one is given."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sized
from pathlib import Path

import torch

_NOT_THE_USERS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
_said: set[str] = set()


class FastPCGradWarning(UserWarning):
    """Something works, but most likely not as it was meant; the message says what to call instead."""


def warn(message: str, category: type[FastPCGradWarning] = FastPCGradWarning) -> None:
    """Warn of the user's line, however many calls of this package and of torch lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def warn_once(message: str) -> None:
    """``warn``, once a process."""
    if message not in _said:
        _said.add(message)
        warn(message)


def warn_of_one_loss(count: int) -> None:
    """Warn once where surgery was asked for and ``count``, the number of losses, leaves nothing to merge."""
    if count == 1:
        warn_once("one loss: nothing to merge; pass the task losses separately, not their sum")


def warn_of_fewer_losses(losses: object, method: object, known: int) -> None:
    """Warn once where losses are fewer than the ``known`` tasks for each of which ``method`` keeps something."""
    if known and isinstance(losses, Sized) and len(losses) < known:
        warn_once(
            f"{len(losses)} losses, and {type(method).__name__} keeps something for each of {known} tasks by its place "
            "in the list: give None in the place of a task that is absent, or call reset() when the tasks change"
        )
