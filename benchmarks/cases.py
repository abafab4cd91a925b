"""What is measured, as data: the kernel grid, the training steps and the peaks."""

from __future__ import annotations

import dataclasses
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
PARAMETER_BYTES = 4  # models are fp32


def bytes_moved(op: str, grads: int, result: int) -> int:
    """Bytes that an op has to read and write where J does not fit the caches (a surgery: two passes)."""
    once = {"gram": grads, "combine": grads + result, "mix_": 2 * grads}
    return once.get(op.removesuffix("_blocks"), 2 * grads + result)


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
        """Elements; padded: rows five cache lines apart modulo a page.

        A row stride that is a power of two puts column k of every row into the same cache set. A careful user pads; a
        ``torch.stack(...)`` is contiguous instead: both layouts are measured.
        """
        if self.layout == "contiguous":
            return self.width
        quantum, page = 64 // self.itemsize, 4096 // self.itemsize
        return -(-self.width // page) * page + 5 * quantum

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def label(self) -> str:
        return f"{self.op} T={self.tasks} N=2^{self.width.bit_length() - 1} {self.dtype} {self.layout}"

    @property
    def bytes_moved(self) -> int:
        return bytes_moved(self.op, self.tasks * self.width * self.itemsize, self.width * self.itemsize)

    @property
    def work(self) -> int:
        """What the time of a peer with T² passes over N grows with."""
        return self.tasks**2 * self.width


@dataclass(frozen=True)
class Batch:
    """Examples or sequences, and tokens of each."""

    sequences: int
    length: int = 1

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length} tokens"


@dataclass(frozen=True)
class Gpt:
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
    context: int = 128
    batch: Batch = Batch(4, 128)
    timed: tuple[int, ...] = (2, 4, 8)
    measured: tuple[int, ...] = (2, 4, 8)

    @property
    def parameters(self) -> int:
        """N without the heads, up to biases and norms."""
        return self.layers * 12 * self.width**2 + (self.vocabulary + self.context) * self.width


GPTS = (
    # A peak would show the granularity of the allocator.
    Gpt("1M", 2048, 128, 4, measured=()),
    Gpt("10M", 4096, 320, 7),
    Gpt("100M", 16384, 768, 12, batch=Batch(2, 128), timed=(4,)),
    Gpt("1G", 32768, 2048, 18, timed=(), measured=(2, 4)),
)
TINY_GPT = Gpt("tiny", 100, 64, 2, batch=Batch(2, 8))
"""For warm-ups and for the check that precedes the timing."""
MEMORY_BATCH = Batch(1, 32)
"""Of the transformers' peaks, of which activations are no part: few of them save time."""


Wide = Literal["mlp w=256", "mlp w=512", "mlp w=1024", "mlp w=2048"]
Recommender = Literal[
    "recommender V=3000", "recommender V=300000", "recommender dense V=100000", "recommender dense V=300000"
]
WIDTHS: dict[Wide, int] = {"mlp w=256": 256, "mlp w=512": 512, "mlp w=1024": 1024, "mlp w=2048": 2048}
TABLES: dict[Recommender, tuple[int, bool]] = {
    "recommender V=3000": (3000, True),
    "recommender V=300000": (300_000, True),
    "recommender dense V=100000": (100_000, False),
    "recommender dense V=300000": (300_000, False),
}
"""Of models that look things up: the size of the table, and whether autograd makes its gradients sparse."""
Named = Literal["tutorial", "mlp", "mlp 0.94M", "mlp 0.17M", "transformer", "wide transformer"] | Wide | Recommender


@dataclass(frozen=True)
class StepCase:
    """One training step of a model of ``benchmarks.models``: one by name, or a transformer of some size."""

    model: Named | Gpt
    tasks: int
    batch: Batch

    @property
    def op(self) -> str:
        """The rows' op: the models of a fixed size are compared with all peers, the large ones mode by mode."""
        return "large" if isinstance(self.model, Gpt) else "step"

    @property
    def label(self) -> str:
        name = f"gpt {self.model.name}" if isinstance(self.model, Gpt) else self.model
        return f"{name} T={self.tasks}"

    @property
    def parameters(self) -> int:
        """About how many, where there are many."""
        return self.model.parameters if isinstance(self.model, Gpt) else 0

    @property
    def for_peaks(self) -> StepCase:
        return dataclasses.replace(self, batch=MEMORY_BATCH) if isinstance(self.model, Gpt) else self


@dataclass(frozen=True)
class FactoredCase(StepCase):
    """A step of which it is of interest what factored rows make of it."""

    model: Literal["mlp", "mlp 0.94M", "mlp 0.17M", "wide transformer"] | Wide | Recommender

    @property
    def op(self) -> str:
        return "factored"

    @property
    def label(self) -> str:
        return f"{super().label} B={str(self.batch).removesuffix(' x 1 tokens')}"


@dataclass(frozen=True)
class FloorCase(FactoredCase):
    """A step of which it is of interest how it compares with T backward passes, as sizes grow."""

    @property
    def op(self) -> str:
        return "floor"


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
    found = [StepCase("tutorial", 2, Batch(64)), StepCase("mlp", 4, Batch(32))]
    return found if quick else [*found, StepCase("mlp", 8, Batch(32)), StepCase("transformer", 4, Batch(16, 64))]


def memory_cases(quick: bool) -> list[StepCase | KernelCase]:
    """The peaks of training steps, and that of ``pcgrad(J)`` alone."""
    return [*(case for case in step_cases(quick) if case.model != "tutorial"), KernelCase("pcgrad", 8, 1 << 22)]


def factored_cases(quick: bool) -> list[FactoredCase]:
    """Where factors pay, and then where they do not."""
    found = [FactoredCase("mlp", 8, Batch(4)), FactoredCase("mlp 0.17M", 8, Batch(32))]
    if quick:
        return found
    return [
        *(FactoredCase("mlp", tasks, Batch(batch)) for tasks, batch in ((8, 4), (8, 32), (4, 32), (8, 256), (4, 256))),
        FactoredCase("mlp 0.94M", 4, Batch(32)),
        FactoredCase("mlp 0.17M", 8, Batch(32)),
        FactoredCase("wide transformer", 4, Batch(8, 64)),
    ]


def factored_memory_cases(quick: bool) -> list[FactoredCase]:
    return [FactoredCase("mlp", 2 if quick else 8, Batch(32))]


def floor_cases(quick: bool) -> list[FloorCase]:
    """MLPs of each width with batches of each size, and tables, sparse and dense, of two sizes."""
    recommenders = [FloorCase(model, 4, Batch(512)) for model in TABLES]
    if quick:
        return [FloorCase("mlp w=256", 8, Batch(16)), recommenders[0]]
    mlps = [FloorCase(model, 8, Batch(batch)) for model in WIDTHS for batch in (4, 16, 64, 256)]
    return [*recommenders, *mlps]


def floor_memory_cases(quick: bool) -> list[FloorCase]:
    """At several T, and at two sizes of a table."""
    if quick:
        return [FloorCase("mlp w=512", 2, Batch(16))]
    mlps = [FloorCase("mlp w=2048", tasks, Batch(32)) for tasks in (2, 4, 8, 16)]
    return [*mlps, *(FloorCase(model, 4, Batch(512)) for model in TABLES)]


def large_cases(quick: bool) -> list[StepCase]:
    of = [(GPTS[0], 2), (GPTS[1], 4)] if quick else [(size, tasks) for size in GPTS for tasks in size.timed]
    return [StepCase(size, tasks, size.batch) for size, tasks in of]


def large_memory_cases(quick: bool) -> list[StepCase | KernelCase]:
    of = [(GPTS[1], 4)] if quick else [(size, tasks) for size in GPTS for tasks in size.measured]
    return [StepCase(size, tasks, size.batch).for_peaks for size, tasks in of]
