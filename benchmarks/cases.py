"""What is measured, as data: the kernel grid, the training steps and the memory cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Op = Literal["pcgrad", "gram", "combine", "mix_"]
Layout = Literal["contiguous", "padded"]

OPS: tuple[Op, ...] = ("pcgrad", "gram", "combine", "mix_")
TASKS = (2, 4, 8, 16, 32)
SMALLEST_WIDTH = 1 << 20
LARGEST_WIDTH = 1 << 24

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def padded_row_stride(width: int, dtype: str) -> int:
    """Rows five cache lines apart modulo a page.

    A row stride that is a power of two puts column k of every row into the same cache set. A careful user pads; a
    ``torch.stack(...)`` is contiguous instead: both layouts are measured.
    """
    quantum, page = 64 // DTYPES[dtype].itemsize, 4096 // DTYPES[dtype].itemsize
    return -(-width // page) * page + 5 * quantum


@dataclass(frozen=True)
class KernelCase:
    """One op on one packed J [T, N].

    ``peers`` is False where only the library and torch's matmul are of interest: the slow peers were timed on
    the same T and N with another layout.
    """

    op: Op
    tasks: int
    width: int
    dtype: str = "float32"
    layout: Layout = "contiguous"
    peers: bool = True

    @property
    def row_stride(self) -> int:
        return padded_row_stride(self.width, self.dtype) if self.layout == "padded" else self.width

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def label(self) -> str:
        return f"{self.op} T={self.tasks} N=2^{self.width.bit_length() - 1} {self.dtype} {self.layout}"

    @property
    def bytes_moved(self) -> int:
        """Bytes that the op has to read and write where J does not fit the caches (pcgrad: two passes)."""
        rows = self.tasks * self.width * self.itemsize
        result = self.width * self.itemsize
        return {"gram": rows, "combine": rows + result, "mix_": 2 * rows, "pcgrad": 2 * rows + result}[self.op]


Model = Literal["tutorial", "mlp", "transformer"]


@dataclass(frozen=True)
class StepCase:
    """One training step: ``model`` names a builder in ``benchmarks.models``."""

    model: Model
    tasks: int
    batch: int

    @property
    def label(self) -> str:
        return f"{self.model} T={self.tasks}"


@dataclass(frozen=True)
class MemoryCase:
    """The peak of one training step, or of ``pcgrad(J)`` alone where ``step`` is None."""

    step: StepCase | None = None
    kernel: KernelCase | None = None

    @property
    def label(self) -> str:
        case = self.step or self.kernel
        assert case is not None
        return f"memory {case.label}"


def kernel_cases(quick: bool) -> list[KernelCase]:
    """What matters most comes first, in case time runs out.

    N=2²² comes before N=2²⁴: what the slow peers took on narrow rows predicts what they would take on wide ones.
    """
    narrow, middle, wide = (
        (SMALLEST_WIDTH, SMALLEST_WIDTH, 1 << 22) if quick else (SMALLEST_WIDTH, 1 << 22, LARGEST_WIDTH)
    )
    first, then = ((8, 2), ()) if quick else ((8, 4, 2), (16, 32))
    found: list[KernelCase] = []
    for tasks in (first, then):
        found += [KernelCase(op, t, n) for t in tasks for n in (middle, wide) for op in OPS]
        padded: tuple[Op, ...] = ("gram", "combine", "pcgrad")
        found += [KernelCase(op, t, wide, layout="padded", peers=False) for t in tasks for op in padded]
    found += [KernelCase(op, t, wide, "bfloat16") for t in ((8,) if quick else (4, 16)) for op in OPS]
    if narrow != middle:
        found += [KernelCase(op, t, narrow) for t in TASKS for op in OPS]
    return found


def step_cases(quick: bool) -> list[StepCase]:
    cases = [StepCase("tutorial", 2, 64), StepCase("mlp", 4, 32)]
    return cases if quick else [*cases, StepCase("mlp", 8, 32), StepCase("transformer", 4, 16)]


def memory_cases(quick: bool) -> list[MemoryCase]:
    steps = [case for case in step_cases(quick) if case.model != "tutorial"]
    return [*(MemoryCase(step=case) for case in steps), MemoryCase(kernel=KernelCase("pcgrad", 8, 1 << 22))]
