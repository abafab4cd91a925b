"""Runs something and raises KeyboardInterrupt at a chosen place of the package's Python code.

Places are where CPython looks for signals: when a function begins, after a call, and when a loop goes back.
"""

import opcode
import sys
from pathlib import Path

import fastpcgrad

PACKAGE = str(Path(fastpcgrad.__file__).parent)
_LOOKS = ("RESUME", "CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


class _Countdown:
    """A trace function: the interrupt comes at the place with that number, counted from 0."""

    def __init__(self, number):
        self.number = number
        self.seen = 0
        self._last = {}

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "return":
            self._last.pop(frame, None)
        if event == "opcode":
            name = opcode.opname[frame.f_code.co_code[frame.f_lasti]]
            looked = self._last.get(frame, "RESUME").startswith(_LOOKS)
            self._last[frame] = name
            if looked:
                self.seen += 1
                if self.seen == self.number + 1:
                    raise KeyboardInterrupt
        return self


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
