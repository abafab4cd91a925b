"""Runs something and raises KeyboardInterrupt at a chosen place of the package's Python code.

Places are where CPython looks for signals: when a function begins, after a call, and when a loop goes back.
"""

import opcode
import sys
from functools import cache
from pathlib import Path

import fastpcgrad

PACKAGE = str(Path(fastpcgrad.__file__).parent)
_LOOKS = ("RESUME", "CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


@cache
def _looks(code):
    """For each offset in a function's code whether CPython looks for signals right after the instruction there."""
    return [opcode.opname[instruction].startswith(_LOOKS) for instruction in code.co_code]


class _Countdown:
    """A trace function: the interrupt comes at the place with that number, counted from 0."""

    def __init__(self, number):
        self.number = number
        self.seen = 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        looks, looked = _looks(frame.f_code), True

        def trace(frame, event, argument):
            nonlocal looked
            if event == "opcode":
                if looked:
                    self.seen += 1
                    if self.seen == self.number + 1:
                        raise KeyboardInterrupt
                looked = looks[frame.f_lasti]
            elif event == "return":  # or a generator's yield: what goes on there looks at once
                looked = True
            return trace

        return trace


def run(action, number):
    """Whether the action was interrupted; not where it has no place of that number."""
    before = sys.gettrace()
    sys.settrace(_Countdown(number))
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def length(action):
    """How many places the action has."""
    counter = _Countdown(1 << 60)
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        action()
    finally:
        sys.settrace(before)
    return counter.seen


def places(action, count):
    """Up to so many numbers of places, spread over all that the action has."""
    last = length(action)
    return range(0, last, max(1, last // count))
