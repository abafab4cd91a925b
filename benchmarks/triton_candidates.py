"""The sizes that ``tune_triton`` tries for each kernel of Triton's that streams J: those around the rule's.

Any of them keeps the numerics: an fp32 accumulator takes 32 products at most (``gram_rows``), or the columns of one
tile of the tensor cores, which are never more than the rule's (``gram_tiles``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from fastpcgrad.backends.triton import choices, kernels, tuned
from fastpcgrad.backends.triton.tuned import Key, Sizes

Op = Literal["gram", "combine", "mix_"]
DTYPES = (torch.float32, torch.bfloat16)
"""fp16 goes as bf16: sizes are kept by the bytes of a number."""
TASKS = (2, 4, 8, 16, 32, 64)
"""The most of each power of two: with fewer, a kernel takes no more registers."""
_CHOICES: dict[Op, Callable[..., choices.Choice]] = {
    "gram": choices.gram_choice,
    "combine": choices.combine_choice,
    "mix_": choices.mix_choice,
}
_SMALLEST_TILE = 16

LEAST_SHARED = 99 << 10
"""Bytes of shared memory that a program may have on every GPU since sm_80; sizes are the same on all."""


class Tuned(NamedTuple):
    """A kernel to be tuned."""

    op: Op
    tasks: int
    dtype: torch.dtype

    @property
    def choice(self) -> choices.Choice:
        """With the sizes that are in force, for aligned rows without segments."""
        return _CHOICES[self.op](self.tasks, self.dtype, 16 // self.dtype.itemsize, False)

    @property
    def key(self) -> Key:
        return choices.key_of(self.choice.kernel, self.tasks, self.dtype)

    @property
    def sizes(self) -> Sizes:
        return choices.sizes_of(self.choice.kernel, self.tasks, self.dtype)

    def candidates(self) -> list[Sizes]:
        """Those in force first."""
        found = self.sizes, *_around(self.choice.kernel, self.tasks, self.dtype)
        return list(dict.fromkeys(found))

    def kernels(self, sizes: Sizes) -> list[choices.Choice]:
        """With these sizes, for aligned rows: of packed ones, and of blocks where there is such a kernel."""
        with sized(self.key, sizes):
            choice = self.choice
        return [choice] if self.op == "mix_" else [choice, choices.of_blocks(choice, self.dtype)]


def all_tuned() -> Iterator[Tuned]:
    """Those first that were furthest from the bandwidth when they were measured."""
    for op, tasks, dtype in itertools.product(_CHOICES, TASKS, DTYPES):
        yield Tuned(op, tasks, dtype)
        if (op, tasks, dtype) == ("gram", 8, torch.float32):
            yield Tuned("gram", 12, dtype)  # the most rows that this kernel has in fp32


def fault(kernel: choices.Choice) -> str:
    """Why a kernel is not to be taken as it was compiled for the GPU at hand; empty where nothing speaks against it."""
    for compiled in kernel.compiled:
        if compiled.n_spills:
            return f"spills registers: {compiled.n_spills}"
        if compiled.metadata.shared > LEAST_SHARED:
            return f"{compiled.metadata.shared} bytes of shared memory: more than some GPUs have"
    return ""


def _around(kernel: Any, tasks: int, dtype: torch.dtype) -> Iterator[Sizes]:
    with sized(choices.key_of(kernel, tasks, dtype), None):
        rule = choices.sizes_of(kernel, tasks, dtype)
    if kernel is kernels.gram_tiles:
        for columns, warps, stages in itertools.product((rule.columns, rule.columns // 2), (4, 8), (3, 4)):
            if columns >= _SMALLEST_TILE:
                yield Sizes(columns, warps, stages)
        return
    for columns, warps in itertools.product((rule.columns // 2, rule.columns, 2 * rule.columns), (4, 8)):
        least = (
            _SMALLEST_TILE if kernel is kernels.mix_tiles else 32 * warps * 16 // dtype.itemsize
        )  # 16 bytes a thread
        if columns >= least:
            for stages in (1, 3) if kernel is kernels.gram_rows else (rule.stages,):
                yield Sizes(columns, warps, stages)


@contextmanager
def sized(key: Key, sizes: Sizes | None) -> Iterator[None]:
    """Within, a kernel has these sizes; None: those of the rule."""
    before = tuned.SIZES.pop(key, None)
    try:
        if sizes is not None:
            tuned.SIZES[key] = sizes
        yield
    finally:
        tuned.SIZES.pop(key, None)
        if before is not None:
            tuned.SIZES[key] = before
