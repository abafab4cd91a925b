"""Where the Triton kernels are faster than the compiled CUDA library, as measured: data.

By ``make gpu`` on an H200 (docs/kernels.md): what took 3 % less time there over the measured sizes from ``nbytes`` of J
on. Triton's kernels take hundreds of microseconds to be called and seconds to be compiled, so small J stays out, and so
do numbers of tasks that were not measured. Rows of fp16 go as those of bf16, whose kernels are the same.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

_WIDE, _HALF = (torch.float32,), (torch.bfloat16, torch.float16)


class Crossover(NamedTuple):
    """An op is faster in Triton for so many tasks, these rows, and from so many bytes of J on."""

    op: str
    tasks: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    nbytes: int


MEASURED: dict[int, tuple[Crossover, ...]] = {
    90: (
        Crossover("gram", (16, 32, 64), _HALF, 1 << 30),
        Crossover("pcgrad", (16, 32, 64), _HALF, 1 << 30),
        Crossover("combine", (2, 4), (*_WIDE, *_HALF), 256 << 20),
        Crossover("combine", (16, 32, 64), (*_WIDE, *_HALF), 1 << 30),
        Crossover("mix_", (2, 4, 8), (*_WIDE, *_HALF), 256 << 20),
        Crossover("mix_", (16,), _WIDE, 256 << 20),
    ),
}
"""By compute capability, 90 for 9.0; elsewhere the compiled library is used throughout."""

LEAST_NBYTES = min(crossover.nbytes for measured in MEASURED.values() for crossover in measured)


def triton_is_faster(op: str, tasks: int, dtype: torch.dtype, nbytes: int, architecture: int) -> bool:
    return any(
        op == crossover.op and tasks in crossover.tasks and dtype in crossover.dtypes and nbytes >= crossover.nbytes
        for crossover in MEASURED.get(architecture, ())
    )


@functools.cache
def architecture_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
