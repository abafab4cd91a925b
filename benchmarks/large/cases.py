"""What is measured, as data: the sizes of the transformer, the numbers of tasks, what each size can afford."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = (2, 4, 8)
CONTEXT = 128
HEAD_WIDTH = 64
PARAMETER_BYTES = 4  # fp32


@dataclass(frozen=True)
class Size:
    """A GPT-style transformer and its batch.

    Attributes:
        timed: the numbers of tasks for which steps are timed.
        measured: those for which peaks are measured.
        slow_modes: whether the slow peers are affordable.
    """

    name: str
    vocabulary: int
    width: int
    layers: int
    timed: tuple[int, ...] = TASKS
    measured: tuple[int, ...] = TASKS
    slow_modes: bool = False

    @property
    def parameters(self) -> int:
        """N without the heads, up to biases and norms."""
        return self.layers * 12 * self.width**2 + (self.vocabulary + CONTEXT) * self.width


SMALL = Size("tiny", 100, 64, 2)
"""For warm-ups and for the check that precedes the timing."""

SIZES = (
    # Its peak would show the granularity of the allocator.
    Size("1M", 2048, 128, 4, measured=(), slow_modes=True),
    Size("10M", 4096, 320, 7, slow_modes=True),
    Size("100M", 16384, 768, 12, timed=(4,)),
    Size("1G", 32768, 2048, 18, timed=(), measured=(2, 4)),
)


@dataclass(frozen=True)
class Batch:
    """Sequences, and tokens of each."""

    sequences: int
    length: int


TIMED_BATCH = Batch(4, CONTEXT)
MEMORY_BATCH = Batch(1, 32)
"""Activations are no part of the figure: few of them save time."""


@dataclass(frozen=True)
class Case:
    size: Size
    tasks: int

    @property
    def label(self) -> str:
        return f"gpt {self.size.name} T={self.tasks}"


def timed_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(SIZES[0], 2), Case(SIZES[1], 4)]
    return [Case(size, tasks) for size in SIZES for tasks in size.timed]


def memory_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(SIZES[1], 4)]
    return [Case(size, tasks) for size in SIZES for tasks in size.measured]
