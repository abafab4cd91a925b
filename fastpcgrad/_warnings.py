"""The category of every warning of this package, so that one filter finds them all, and warnings that come once."""

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]
_said: set[str] = set()


class FastPCGradWarning(UserWarning):
    """Something works, but most likely not as it was meant; the message says what to call instead."""


def warn_once(message: str) -> None:
    """A ``FastPCGradWarning``, once a process, that points at the line which called into this package."""
    if message in _said:
        return
    _said.add(message)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FastPCGradWarning, stacklevel=level)


def warn_of_one_loss(count: int) -> None:
    """Warn once where surgery was asked for and ``count``, the number of losses, leaves nothing to merge."""
    if count == 1:
        warn_once("one loss: nothing to merge; pass the task losses separately, not their sum")
