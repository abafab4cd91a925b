"""What is measured, as data: the sizes of the transformer, the numbers of tasks, what each size can afford."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = (2, 4, 8)
CONTEXT = 128
HEAD_WIDTH = 64
PARAMETER_BYTES = 4  # fp32


@dataclass(frozen=True)
class Batch:
    """Sequences, and tokens of each."""

    sequences: int
    length: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length} tokens"


MEMORY_BATCH = Batch(1, 32)
"""Activations are no part of the figure: few of them save time."""


@dataclass(frozen=True)
class Size:
    """A GPT-style transformer.

    Attributes:
        context: positions that it can tell apart.
        batch: of a timed step.
        timed: the numbers of tasks for which steps are timed.
        measured: those for which peaks are measured.
    """

    name: str
    vocabulary: int
    width: int
    layers: int
    context: int = CONTEXT
    batch: Batch = Batch(4, CONTEXT)
    timed: tuple[int, ...] = TASKS
    measured: tuple[int, ...] = TASKS

    @property
    def parameters(self) -> int:
        """N without the heads, up to biases and norms."""
        return self.layers * 12 * self.width**2 + (self.vocabulary + self.context) * self.width


SMALL = Size("tiny", 100, 64, 2)
"""For warm-ups and for the check that precedes the timing."""

SIZES = (
    # A peak would show the granularity of the allocator.
    Size("1M", 2048, 128, 4, measured=()),
    Size("10M", 4096, 320, 7),
    Size("100M", 16384, 768, 12, batch=Batch(2, CONTEXT), timed=(4,)),
    Size("1G", 32768, 2048, 18, timed=(), measured=(2, 4)),
)


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
